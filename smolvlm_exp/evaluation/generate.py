"""Answers as a person would get them, ending where the chat template ends one; and how fast."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smolvlm_exp.data.tokens import control_tokens, escape_control_tokens, render_prompt, tokenize_rows
from smolvlm_exp.engine.generation.answers import ANSWERS, plan_for, sample_answers, tile_features
from smolvlm_exp.engine.generation.batch import SamplingBatch
from smolvlm_exp.engine.generation.decoder import Decoder, decoder_obstacle
from smolvlm_exp.engine.generation.sampler import STEPS_BETWEEN_CHECKS, Answer, Prompt, embed
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.engine.inputs.tiles import pixels, tile
from smolvlm_exp.utils.distributed import rank_slice, rank_world, scatter_map
from smolvlm_exp.utils.progress import progress, track
from smolvlm_exp.utils.units import GIB

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

log = logging.getLogger(__name__)

TIMED_TOKENS = 32  # of an answer whose speed is measured
UPSTREAM_ROWS = 8  # that transformers' `generate` gets at a time


@torch.no_grad()
def generate_answers(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: Sequence[dict[str, Any]],
    sampling: Sampling,
    prompts: Sequence[Prompt] | None = None,
) -> list[str]:
    """The model's answer to each row's prompt; the global random state is left unchanged.

    Args:
        model: PyTorch's, or an exported one with a `generate` of its own.
        rows: each with `images` and `prompt` (messages), as data/preferences.py has them.
        prompts: the same rows' prompts, where they are there already.
    """
    if not isinstance(model, nn.Module):
        return upstream_answers(model, processor, rows, sampling)
    if obstacle := decoder_obstacle(model):
        log.info(f"answers: by transformers' generate, and slower: {obstacle}")
        return upstream_answers(model, processor, rows, sampling)
    model.eval()
    asked = read_prompts(model, processor, rows) if prompts is None else prompts
    processes = rank_world()[1]

    def answer(share: range) -> list[Answer]:
        own = replace(sampling, seed=sampling.seed + share.start)  # a row's seed does not depend on the processes
        return [first for first, *_ in sample_answers(model, processor, asked[share.start : share.stop], own)]

    shares = [rank_slice(len(asked), rank, processes) for rank in range(processes)]
    answers = chain(*scatter_map(shares, answer, model))
    return [text.strip() for text in processor.batch_decode([a.ids for a in answers], skip_special_tokens=True)]


def read_prompts(model: Any, processor: Any, rows: Sequence[dict[str, Any]]) -> list[Prompt]:
    """The prompts of rows with images and messages; an image is tiled when its prompt is read."""
    controls, normalise = control_tokens(processor), pixels(processor)
    messages = [{"prompt": escape_control_tokens(row["prompt"], controls)} for row in rows]
    count_tiles = processor.image_processor.get_number_of_image_patches
    shapes = [[count_tiles(image.height, image.width)[1:] for image in row["images"]] for row in rows]

    def features(images: list[Any]) -> torch.Tensor:
        tiles = torch.cat([tile(image, processor.image_processor) for image in images])
        return tile_features(model, tiles, normalise)

    return [
        Prompt(torch.tensor(ids["prompt"]), partial(features, row["images"]) if row["images"] else None)
        for row, ids in zip(rows, tokenize_rows(processor, messages, shapes, {}), strict=True)
    ]


def upstream_answers(model: Any, processor: Any, rows: Sequence[dict[str, Any]], sampling: Sampling) -> list[str]:
    """By the model's own `generate`."""
    model.eval()
    # From the full distribution: upstream's default is the 50 likeliest tokens.
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    decoding = drawn if sampling.temperature else {"do_sample": False}
    # Prompts of similar length share a batch, so that little is padded; the order is restored at the end.
    order = sorted(range(len(rows)), key=lambda i: [image.size for image in rows[i]["images"]])
    starts = range(0, len(order), UPSTREAM_ROWS)

    def answer(start: int) -> list[str]:
        batch = order[start : start + UPSTREAM_ROWS]
        inputs = left_padded(processor, [rows[i] for i in batch]).to(model.device)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(sampling.seed + start)
            ids = model.generate(
                **inputs,
                **decoding,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=processor.tokenizer.eos_token_id,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        advance(len(texts))
        return [text.strip() for text in texts]

    with progress(ANSWERS, len(rows) // rank_world()[1]) as advance:
        answers = dict(zip(order, chain(*scatter_map(starts, answer, model)), strict=True))
    return [answers[i] for i in range(len(rows))]


def left_padded(processor: "ProcessorMixin", rows: Sequence[dict[str, Any]]) -> Any:
    """What `generate` reads, padded on the left: an answer must follow its prompt directly.

    Control tokens that a prompt spells are text; see data/tokens.py.
    """
    return processor(
        text=[render_prompt(processor, row["prompt"]) for row in rows],
        images=[row["images"] for row in rows],
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )


@dataclass(frozen=True)
class Speed:
    batch_size: int
    first_token: float  # seconds to the first token of every answer of a batch, images and prompts included
    tokens_per_second: float  # of all answers of the batch together, after the first token
    memory_peak_gib: float | None  # of the GPU

    def __str__(self) -> str:
        memory = f", {self.memory_peak_gib:.2f} GiB" if self.memory_peak_gib is not None else ""
        return (
            f"batch size {self.batch_size}: first token after {self.first_token:.3f} s, "
            f"{self.tokens_per_second:.1f} tokens/s{memory}"
        )


@torch.no_grad()
def generation_speed(
    model: "PreTrainedModel", processor: "ProcessorMixin", prompts: Sequence[Prompt], batch_sizes: tuple[int, ...]
) -> list[Speed]:
    """For answers of exactly TIMED_TOKENS tokens to the first prompts."""
    model.eval()
    sizes = sorted({min(size, len(prompts)) for size in batch_sizes})
    return [batch_speed(model, processor, prompts[:size]) for size in track(sizes, "speed of answers", len(sizes))]


def batch_speed(model: Any, processor: Any, prompts: Sequence[Prompt]) -> Speed:
    """Of as many of the prompts at a time as memory allows."""
    gpu = model.device.type == "cuda"
    sampling = Sampling(TIMED_TOKENS, min_new_tokens=TIMED_TOKENS)
    plan = plan_for(model, prompts, sampling)
    prompts = prompts[: plan.rows]
    longest = max(len(prompt.ids) for prompt in prompts)
    part = max(1, plan.prefill_tokens // longest)  # prompts that are read together
    decoder, end = Decoder(model, plan.merge), processor.tokenizer.eos_token_id
    batch = SamplingBatch(decoder, len(prompts), 1, longest, sampling, end)

    def seconds() -> tuple[float, float]:
        """To the first tokens, and from there to the last: clocks of one run, so that neither can be negative."""
        start = time.perf_counter()
        for at in range(0, len(prompts), part):
            rows = range(len(prompts))[at : at + part]
            embeddings, lengths = embed(decoder, [prompts[row] for row in rows], processor.image_token_id)
            batch.read([*rows], embeddings, lengths, rows)
        batch.ended_groups()  # waits for the GPU
        first = time.perf_counter()
        while not all(batch.ended_groups()):
            batch.advance(STEPS_BETWEEN_CHECKS)
        return first - start, time.perf_counter() - first

    if gpu:
        torch.cuda.reset_peak_memory_stats()
    # The fastest of three runs: the first compiles, and another may be disturbed.
    first, rest = map(min, zip(*(seconds() for _ in range(3)), strict=True))
    peak = torch.cuda.max_memory_allocated() / GIB if gpu else None
    return Speed(len(prompts), first, len(prompts) * (TIMED_TOKENS - 1) / rest, peak)
