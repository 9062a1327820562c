"""A byte-level BPE tokenizer with SmolVLM's special tokens: the embedded model's own, and stand-ins of any real size.

`python -m smolvlm_exp.models.tokenizer FOLDER` writes a processor for the embedded shape, the same on every machine.
Its merges follow the embedded data's words, so a model is to be trained with the one it keeps.
"""

import json
import random
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from smolvlm_exp.models.shape import Shape

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2 in every SmolVLM
TILES = ("<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)))


def stand_in_tokenizer(shape: "Shape") -> "PreTrainedTokenizerFast":
    """A tokenizer of exactly `shape.vocab_size` tokens with the control tokens at the real ids.

    Byte-level BPE is trained on the embedded data's texts, so it splits other texts far finer than the real one.
    SPECIAL_TOKENS, bytes and merges come first; ids that no text yields are named `<unused_N>`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    controls = {
        shape.fake_image_token_id: "<fake_token_around_image>",
        shape.image_token_id: "<image>",
        shape.end_of_utterance_id: "<end_of_utterance>",
    }
    if shape.global_image_token_id is not None:
        controls |= {shape.global_image_token_id + i: token for i, token in enumerate(TILES)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=min(min(controls), 600),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    trained = json.loads(tokenizer.to_str())
    vocabulary = trained["model"]["vocab"]
    assert len(vocabulary) <= min(controls), "a control token's id lies within the trained vocabulary"
    vocabulary |= {token: i for i, token in controls.items()}
    unused = set(range(shape.vocab_size)) - set(vocabulary.values())
    vocabulary |= {f"<unused_{i}>": i for i in sorted(unused)}
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (*SPECIAL_TOKENS, *controls.values())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=shape.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def corpus() -> Iterable[str]:
    """The words of 3,000 embedded pairs, as the chat template frames them."""
    from smolvlm_exp.data.scenes import draw_scene_content
    from smolvlm_exp.data.sources import shapes

    for index in range(3000):
        rng = random.Random(f"tokenizer/{index}")
        scene = draw_scene_content(rng, shapes.choose_kinds(rng))
        pairs = (
            shapes.caption_pair(scene, "exact", rng),
            shapes.presence_pair(scene, rng),
            shapes.detail_pair(scene, rng),
        )
        for question, chosen, rejected in pairs:
            yield f"User:{question}\nAssistant: {chosen}\n\n"
            yield f" {rejected}"


if __name__ == "__main__":
    from smolvlm_exp.models.shape import make_processor, shape_of

    tiny = shape_of("tiny")
    make_processor(tiny, stand_in_tokenizer(tiny), longest_edge=2 * tiny.image_size).save_pretrained(sys.argv[1])
