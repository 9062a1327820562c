"""How fast a model answers: time to the first token, tokens a second, memory."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smolvlm_exp.evaluation.generate import prompts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

TOKENS = 32
GIB = 2**30


@dataclass(frozen=True)
class Speed:
    batch_size: int
    first_token: float  # seconds to the first token of every answer of a batch, pictures and prompts read
    tokens_per_second: float  # of all answers of the batch together, after the first token
    memory_peak_gib: float | None  # of the GPU

    def in_words(self) -> str:
        memory = f", {self.memory_peak_gib:.2f} GiB" if self.memory_peak_gib is not None else ""
        return (
            f"{self.batch_size} at a time: first token after {self.first_token:.3f} s, "
            f"{self.tokens_per_second:.1f} tokens/s{memory}"
        )


@torch.no_grad()
def generation_speed(
    model: "PreTrainedModel", processor: "ProcessorMixin", rows: "Dataset", batch_sizes: tuple[int, ...]
) -> list[Speed]:
    """Of answers of exactly TOKENS tokens to the first rows; of two runs the second is timed."""
    model.eval()
    return [of_batch(model, prompts(processor, [rows[i] for i in range(size)]).to(model.device), size)
            for size in sorted({min(size, len(rows)) for size in batch_sizes})]  # fmt: skip


def of_batch(model: Any, inputs: Any, size: int) -> Speed:
    gpu = model.device.type == "cuda"

    def seconds(tokens: int) -> float:
        for _ in range(2):
            if gpu:
                torch.cuda.synchronize()
            begun = time.perf_counter()
            model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
            if gpu:
                torch.cuda.synchronize()
        return time.perf_counter() - begun

    if gpu:
        torch.cuda.reset_peak_memory_stats()
    first, whole = seconds(1), seconds(TOKENS)
    peak = torch.cuda.max_memory_allocated() / GIB if gpu else None
    return Speed(size, first, size * (TOKENS - 1) / (whole - first), peak)
