"""Answers to many prompts, some at a time: those that have ended leave, and waiting prompts take their place.

Memory decides how many at a time, and whether the layers are unpacked for it; see `plan_sampling`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smolvlm_exp.engine.generation.batch import SamplingBatch
from smolvlm_exp.engine.generation.decoder import Decoder
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.engine.model_parts import base_of, core_of

ROWS = 256  # answers that are worked on at a time, where memory allows
PREFILL_TOKENS = 16_384  # of prompts that are read together, where memory allows
USABLE = 0.8  # of the free memory: the rest is for what the plan does not count
STEPS_BETWEEN_CHECKS = 8  # on a GPU, which has to be waited for to see which rows have ended


@dataclass(frozen=True)
class Prompt:
    ids: torch.Tensor  # (P,) int64
    features: Callable[[], torch.Tensor] | None = None  # -> (n, tokens, H) of its tiles; called when it is read


@dataclass(frozen=True)
class Answer:
    ids: list[int]  # without the end token
    ended: bool  # by the end token; else it was cut at max_new_tokens
    logps: torch.Tensor | None  # of `ids` and, if it ended, the end token; at the temperature they were drawn with

    @property
    def mean_logp(self) -> float:
        """Per token, in nats; of an answer that was sampled with `logps`."""
        assert self.logps is not None
        return float(self.logps.mean())


@torch.no_grad()
def sample(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    end: int,
    image_token: int,
    answers: int = 1,
    rows: int = ROWS,
    logps: bool = False,
    prefill_tokens: int = PREFILL_TOKENS,
) -> Iterator[tuple[int, list[Answer]]]:
    """Each prompt's number and its answers, in the order in which they end.

    Row r of prompt i draws with the seed `sampling.seed + i * answers + r`, whatever else is in the batch.

    Args:
        end, image_token: ids of the token that ends an answer, and of the places of an image's features.
        answers: to each prompt.
        rows: at most so many answers are worked on at a time.
        logps: of the drawn tokens are wanted.
        prefill_tokens: at most so many tokens of prompts are read together, or those of one prompt.
    """
    assert not sampling.stop, "the sampler knows tokens only; stop texts end a session's answers"
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))  # like lengths are read together
    if not waiting:
        return
    groups = max(1, min(rows // answers, len(waiting)))
    batch = SamplingBatch(decoder, groups, answers, len(prompts[waiting[0]].ids), sampling, end, logps)
    active: dict[int, int] = {}  # group -> its prompt's number
    while waiting or active:
        free = [group for group in range(batch.groups) if group not in active]
        while free and waiting:
            count = min(len(free), max(1, prefill_tokens // len(prompts[waiting[0]].ids)))
            entering = dict(zip(free[:count], waiting, strict=False))
            embeddings, lengths = embed(decoder, [prompts[i] for i in entering.values()], image_token)
            seeds = [sampling.seed + i * answers + row for i in entering.values() for row in range(answers)]
            batch.read(list(entering), embeddings, lengths, seeds)
            active |= entering
            free, waiting = free[count:], waiting[count:]
        batch.advance(STEPS_BETWEEN_CHECKS)
        for group in [group for group, ended in enumerate(batch.ended_groups()) if ended and group in active]:
            yield active.pop(group), [Answer(*answer) for answer in batch.answers_of(group)]
        if not waiting and active and batch.can_shrink(len(active)):
            batch.shrink(sorted(active))
            active = dict(enumerate(active[group] for group in sorted(active)))


@dataclass(frozen=True)
class SamplingPlan:
    """What `Decoder` and `sample` are given so that they fit."""

    merge: bool
    rows: int
    prefill_tokens: int


def plan_sampling(model: Any, free: int, longest: int, new_tokens: int, answers: int = 1) -> SamplingPlan:
    """The fastest way that fits: layers unpacked once if that leaves room for a prompt's answers, then as many rows.

    Args:
        free: bytes of the model's device that sampling may take.
        longest: tokens of the longest prompt; new_tokens: of an answer, at most; answers: to each prompt.
    """
    config, element = core_of(model).text_model.config, base_of(model).get_output_embeddings().weight.element_size()
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * size * element  # its keys and values
    row = new_tokens * token + 12 * config.vocab_size  # logits, their softmax and its order in float32
    group = longest * token + answers * row
    # A token of a prompt that is read: hidden states before and after, the MLP's two halves, queries, keys, values.
    prefill = element * (4 * config.hidden_size + 3 * config.intermediate_size + 3 * config.num_attention_heads * size)
    attention = config.hidden_size * size * 2 * (config.num_attention_heads + config.num_key_value_heads)
    unpacked = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size) * element
    usable = int(USABLE * free) - longest * prefill
    merge = usable - unpacked >= group
    usable -= unpacked if merge else 0
    groups = max(1, min(ROWS // answers, usable // group))
    spare = max(0, usable - groups * group) // prefill
    return SamplingPlan(merge, groups * answers, min(PREFILL_TOKENS, longest + spare))


def embed(decoder: Decoder, prompts: Sequence[Prompt], image_token: int) -> tuple[torch.Tensor, list[int]]:
    """(prompts, longest, H) their tokens with their images' features in place, padded on the right; their lengths."""
    ids = torch.nn.utils.rnn.pad_sequence([prompt.ids for prompt in prompts], batch_first=True, padding_value=0)
    ids = ids.to(decoder.device)
    embeddings: Any = decoder.embed(ids)
    features = [prompt.features().flatten(0, 1) for prompt in prompts if prompt.features]
    if features:
        places = (ids == image_token).flatten().nonzero().flatten()
        inserted = torch.cat(features).to(embeddings)
        embeddings = embeddings.flatten(0, 1).index_copy(0, places, inserted).view_as(embeddings)
    return embeddings, [len(prompt.ids) for prompt in prompts]
