"""The folders of the released models as the Hub has them, around a small model and a small vocabulary."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from smolvlm_exp.models.shape import EMBEDDED, Shape, model_config, shape_of
from smolvlm_exp.models.tokenizer import SPECIAL_TOKENS, TILES

RELEASED = (
    "smolvlm", "smolvlm_256m", "smolvlm_500m", "smolvlm2_2b", "smolvlm2_256m", "smolvlm2_500m",
)  # fmt: skip
FIRST = 600  # the id at which added tokens begin, in place of 49152
SMOLLM = (  # ids 3 to 16
    "<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>",
    "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>",
    "<empty_output>",
)  # fmt: skip
FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": END, "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
GRANITE = (
    "{%- for message in messages -%}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' -}}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- elif part['type'] == 'image' -%}{{- '<image>' -}}{%- endif -%}{%- endfor -%}{{- '<|end_of_text|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}"
)
STRINGS = (  # many of which a byte-level tokenizer reads otherwise where it does not split digits first
    "\n\n1. Cut", "a   5", "½", "  x = 10;\n\tif x > 2.50:\n\t\treturn x ** 3", "v1.2.3-rc4", "1,234,567.89", "٣٤", "Ⅷ",
    "x²", "10:45 pm", " 7", "7 ", "\t8\n", "3rd", "0x1F", "a1b2c3", "é 9", "\u00a05", "\r\n12", "½½ 1/2",
    "5\u20e3", "\uff11\uff12",
)  # fmt: skip
CORPUS = (
    "\n\n1. Cut the red star. \n\n2. Is there   a blue   circle?\n    return x\n\t\tif y:",
    "The quick brown fox jumps over it; ½ and é, 中文 and emoji 🙂.", "User:What is this? Assistant: A star, 12 of 34.",
)  # fmt: skip


def hard_strings() -> list[str]:
    """A hundred: digits, spaces, line breaks, other scripts, code, and each joined with another."""
    texts = [
        *STRINGS, "", " ", "\n", "\n\n\n", "   ", "Hello world", "naïve café", "中文字符", "🙂🙃", "👩‍👩‍👧", "don't",
        "it's 5's", "<not a token>", "a\u2060b", "\u200b", "{'a': [1, 2]}", "SELECT * FROM t WHERE id=42;", "ﬁ",
        "e\u0301", "ẞ",
    ]  # fmt: skip
    joined = [f"{one}{other}" for one, other in zip(texts, texts[7:] + texts[:7], strict=True)]
    spaced = [f" {one}\n{other} 3" for one, other in zip(texts, texts[3:], strict=False)]
    return list(dict.fromkeys([*texts, *joined, *spaced]))[:100]


def vocabulary(shape: Shape) -> dict[int, str]:
    """Its added tokens by id, as the model has them: three, or 128 with tiles' tags and reserved ones."""
    added = {shape.fake_image_token_id: FAKE, shape.image_token_id: IMAGE, shape.end_of_utterance_id: END}
    if shape.global_image_token_id is not None:
        added |= {shape.global_image_token_id + i: token for i, token in enumerate(TILES)}
        free = sorted(set(range(FIRST, shape.vocab_size)) - set(added))
        added |= {token: f"<|reserved_special_token_{i}|>" for i, token in enumerate(free)}
    return dict(enumerate((*SPECIAL_TOKENS, *SMOLLM))) | dict(sorted(added.items()))


def tokenizer_file(file: Path, added: dict[int, str]) -> None:
    """A tokenizer.json with the steps of the real one: digits apart, then byte-level BPE."""
    first = min(i for i in added if i >= FIRST)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    low = [token for i, token in added.items() if i < first]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=first, special_tokens=low, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([*CORPUS * 2, *STRINGS], trainer)
    saved = json.loads(tokenizer.to_str())
    size = len(saved["model"]["vocab"])
    saved["model"]["vocab"] |= {f"<filler_{i}>": i for i in range(size, first)}
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added.values()])
    assert {token: tokenizer.token_to_id(token) for token in added.values()} == {t: i for i, t in added.items()}
    tokenizer.save(str(file))


def small_shape(model: str) -> Shape:
    """The released shape, its tiles as they are, with few weights."""
    real = shape_of(model)
    moved = {
        name: getattr(real, name) - 49152 + FIRST
        for name in ("vocab_size", "image_token_id", "fake_image_token_id", "end_of_utterance_id")
    }
    return replace(
        real, **moved, hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, vision_hidden_size=32, vision_num_hidden_layers=1,
        vision_intermediate_size=32, vision_num_attention_heads=2,
        global_image_token_id=None if real.global_image_token_id is None else FIRST,
    )  # fmt: skip


def publish(model: str, folder: Path, weights: bool = False) -> Path:
    """A folder with the files of the model in conf/model/<model>.yaml, in the versions that the Hub has."""
    shape = small_shape(model)
    second = shape.architecture == "smolvlm"
    kind = "SmolVLM" if second else "Idefics3"
    folder.mkdir(parents=True)
    publish_model(folder, shape, weights)
    publish_images(folder, shape, kind)
    if second:
        images = json.loads((folder / "preprocessor_config.json").read_text())
        films = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": shape.image_size}}
        write(folder / "preprocessor_config.json", {**images, "video_sampling": films})
    template = (EMBEDDED / "chat_template.jinja").read_text()
    if second:
        film = "{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}{% endfor %}<end"
        template = template.replace("{% endif %}{% endfor %}<end", film)
    write(folder / "chat_template.json", {"chat_template": template})
    publish_tokenizer(folder, vocabulary(shape), f"{kind}Processor", SPECIAL, named=second)
    return folder


def publish_docling(folder: Path, granite: bool) -> Path:
    """What was made from SmolVLM-256M, with weights.

    SmolDocling has tags for documents where SmolVLM has reserved tokens. granite-docling has another vocabulary and
    chat template, which ends a turn with <|end_of_text|>, and a tied head.
    """
    shape = replace(small_shape("smolvlm_256m"), max_position_embeddings=4096)
    added = vocabulary(shape)
    tags = iter(("<doctag>", "</doctag>", "<otsl>", "</otsl>", "<fcel>", "<nl>", "<page_break>"))
    added = {i: next(tags, token) if "reserved" in token else token for i, token in added.items()}
    special, template = SPECIAL, (EMBEDDED / "chat_template.jinja").read_text()
    if granite:
        moved = {"fake_image_token_id": FIRST + 40, "image_token_id": FIRST + 4, "end_of_utterance_id": FIRST}
        shape = replace(shape, **moved, vocab_size=FIRST + 42)
        names = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>", IMAGE, *TILES[1:])
        added = dict(enumerate(names, FIRST)) | {FIRST + 40: FAKE, FIRST + 41: TILES[0]}
        special = {"bos_token": names[1], "eos_token": names[0], "pad_token": names[3], "unk_token": names[0]}
        template = GRANITE
    folder.mkdir(parents=True)
    publish_model(folder, shape, weights=True, tied=granite)
    publish_images(folder, shape, "Idefics3")
    (folder / "chat_template.jinja").write_text(template)
    publish_tokenizer(folder, added, "Idefics3Processor", special, named=False)
    return folder


def publish_model(folder: Path, shape: Shape, weights: bool, tied: bool = False) -> None:
    config = model_config(shape)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    if weights:
        import torch
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    saved = config.to_dict()
    leftovers = {"_flash_attn_2_enabled": True, "neftune_noise_alpha": 0.0, "qk_layer_norms": False}
    saved["text_config"] |= {**leftovers, "perceiver_config": {"resampler_n_latents": 64}, "pixel_shuffle_factor": 4}
    rope = saved["text_config"].pop("rope_parameters")["rope_theta"]
    saved["text_config"] |= {"rope_theta": rope, "rope_scaling": None, "architectures": ["VLlama3ForCausalLM"]}
    saved["vision_config"] |= {"size": {"longest_edge": 4 * shape.image_size}, "use_base_siglip": False}
    saved["vision_config"] |= {"max_image_size": {"longest_edge": shape.image_size}}
    write(folder / "config.json", saved | {"pad_token_id": 128002, "transformers.js_config": {"dtype": "q4"}})
    write(folder / "generation_config.json", {"eos_token_id": shape.end_of_utterance_id, "pad_token_id": 2})


def publish_images(folder: Path, shape: Shape, kind: str) -> None:
    images = {
        "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 1,
        "rescale_factor": 0.00392156862745098, "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor", "size": {"longest_edge": 4 * shape.image_size},
        "max_image_size": {"longest_edge": shape.image_size},
    }  # fmt: skip
    write(folder / "preprocessor_config.json", images)
    write(
        folder / "processor_config.json",
        {"image_seq_len": shape.image_seq_len, "processor_class": f"{kind}Processor"},
    )


def publish_tokenizer(
    folder: Path, added: dict[int, str], processor_class: str, special: dict[str, str], named: bool
) -> None:
    """Its files; `named`: also by the names that SmolVLM2's has for control tokens."""
    names = {
        "end_of_utterance_token": END, "fake_image_token": FAKE, "image_token": IMAGE, "global_image_token": TILES[0],
    }  # fmt: skip
    listed = [token for token in (FAKE, IMAGE, END) if token in added.values()]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokenizer_file(folder / "tokenizer.json", added)
    write(folder / "vocab.json", json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write(folder / "added_tokens.json", {token: i for i, token in added.items() if i >= FIRST})
    write(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(i): {"content": t, **flags, "special": True} for i, t in added.items()},
            "additional_special_tokens": listed,
            **special,
            **({**names, "extra_special_tokens": names} if named else {}),
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 16384,
            "processor_class": processor_class,
            "tokenizer_class": "GPT2Tokenizer",
            "truncation_side": "left",
            "vocab_size": FIRST,
        },
    )
    marked = {name: {"content": token, **flags} for name, token in special.items()}
    write(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": [{"content": token, **flags} for token in listed], **marked},
    )


def write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2))


def ids_of_file(folder: Path, texts: Iterable[str]) -> list[list[int]]:
    """The token ids as tokenizer.json says, without transformers."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
