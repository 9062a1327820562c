"""Answers as a person would get them: batched, greedy or sampled, ending at <end_of_utterance>; and how fast."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from smolvlm_exp.data.tokens import render_prompt
from smolvlm_exp.utils.distributed import scatter_map
from smolvlm_exp.utils.units import GIB

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

TIMED_TOKENS = 32  # of an answer whose speed is measured


@torch.no_grad()
def generate_answers(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The model's answer to each row's prompt.

    Args:
        rows: each with `images` and `prompt` (messages), as data/preferences.py has them.
        temperature: of sampling; 0: greedy.
        seed: of sampling; the global random state is left unchanged.
    """
    model.eval()
    # From the full distribution: upstream's default is the 50 likeliest tokens.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    decoding = sampling if temperature else {"do_sample": False}
    # Prompts of similar length share a batch, so that little is padded; the order is restored at the end.
    order = sorted(range(len(rows)), key=lambda i: [image.size for image in rows[i]["images"]])
    starts = range(0, len(order), batch_size)

    def answer(start: int) -> list[str]:
        batch = order[start : start + batch_size]
        inputs = prompts(processor, [rows[i] for i in batch]).to(model.device)
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed + start)
            ids = model.generate(  # type: ignore[operator]
                **inputs,
                **decoding,
                max_new_tokens=max_new_tokens,
                eos_token_id=processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>"),
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    answers = dict(zip(order, chain(*scatter_map(starts, answer, model)), strict=True))
    return [answers[i] for i in range(len(rows))]


def prompts(processor: "ProcessorMixin", rows: Sequence[dict[str, Any]]) -> Any:
    """What the model's `generate` reads, padded on the left: an answer must follow its prompt directly.

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
    first_token: float  # seconds to the first token of every answer of a batch, the prefill
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
    model: "PreTrainedModel", processor: "ProcessorMixin", rows: "Dataset", batch_sizes: tuple[int, ...]
) -> list[Speed]:
    """For answers of exactly TIMED_TOKENS tokens to the first rows."""
    model.eval()
    speeds = []
    for size in sorted({min(size, len(rows)) for size in batch_sizes}):
        inputs = prompts(processor, [rows[i] for i in range(size)]).to(model.device)
        speeds.append(batch_speed(model, inputs, size))
    return speeds


def batch_speed(model: Any, inputs: Any, size: int) -> Speed:
    gpu = model.device.type == "cuda"

    def seconds(tokens: int) -> float:
        """Of the second of two runs."""
        for _ in range(2):
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
            if gpu:
                torch.cuda.synchronize()
        return time.perf_counter() - start

    if gpu:
        torch.cuda.reset_peak_memory_stats()
    first, full = seconds(1), seconds(TIMED_TOKENS)
    peak = torch.cuda.max_memory_allocated() / GIB if gpu else None
    return Speed(size, first, size * (TIMED_TOKENS - 1) / (full - first), peak)
