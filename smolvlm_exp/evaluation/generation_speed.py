"""How fast a model answers: time to the first token, tokens/s, memory."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smolvlm_exp.evaluation.generate import prompts
from smolvlm_exp.utils.units import GIB

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

TOKENS = 32


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
    """For answers of exactly TOKENS tokens to the first rows; the second of two runs is timed."""
    model.eval()
    return [batch_speed(model, prompts(processor, [rows[i] for i in range(size)]).to(model.device), size)
            for size in sorted({min(size, len(rows)) for size in batch_sizes})]  # fmt: skip


def batch_speed(model: Any, inputs: Any, size: int) -> Speed:
    gpu = model.device.type == "cuda"

    def seconds(tokens: int) -> float:
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
    first, full = seconds(1), seconds(TOKENS)
    peak = torch.cuda.max_memory_allocated() / GIB if gpu else None
    return Speed(size, first, size * (TOKENS - 1) / (full - first), peak)
