"""What an image's resolution costs: a training step at one to four tiles along the long edge (`model.longest_edge`).

    python -m benchmarks.resolution [--model smolvlm] [--targets text,recipe] [--tiles 1,2,3,4]
    python -m benchmarks.resolution --model tiny --tiles 1,2 --rows 32 --steps 3      half a minute on a CPU

Nf4, DoRA, random weights in the real shape, images of 640 x 480, answers of 40 to 200 tokens, 16 pairs per step, in
micro-batches as `trainer.memory_budget=auto` plans them (8 without a GPU). Seconds are medians of steps. `once`: what a
data set's pairs cost before training: image features (text adapters) or tiles, and the reference; nothing cached, but
the start of the processes that tile is spread over `--rows`. Prints a table for RESULTS.md; what resolution does to
quality is measured by whole runs of the embedded model, which stand there too.
"""

import argparse
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.command import empty_folder, machine
from benchmarks.dpo import Bench
from benchmarks.setting import GIB, empty_cache
from smolvlm_exp.utils.startup import silence_upstream

SIZE, PAIRS = (640, 480), 10_000
WARM = 2  # steps that are left out


class StepTimes(TrainerCallback):
    """Seconds of each step after the first ones, and memory's peak from there on."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if state.global_step == WARM and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @property
    def seconds(self) -> float:
        """The median of a step's."""
        return median(end - began for began, end in pairwise(self.ends[WARM - 1 :]))


@dataclass
class Cost:
    """Of a resolution."""

    target: str
    longest_edge: int  # pixels
    tokens: int  # per image
    micro_batch: int
    seconds: float  # per pair of a training step
    once: float  # seconds per pair before training
    peak: float  # GiB; 0 without a GPU

    def row(self) -> str:
        hours = PAIRS * (self.seconds + self.once) / 3600
        return (f"| {self.target} | {self.longest_edge} | {self.tokens:,} | {self.micro_batch} | {self.seconds:.4f} | "
                f"{self.once:.4f} | {hours:.2f} | {self.peak:.2f} |")  # fmt: skip


def measure(bench: Bench, target: str, edge: int, asked: argparse.Namespace, work: Path) -> Cost:
    config = bench.config(
        f"model.longest_edge={edge}", f"adapter.target={target}", "trainer.memory_budget=auto",
        "trainer.gradient_checkpointing=false", "trainer.per_device_train_batch_size=8",
        "trainer.gradient_accumulation_steps=2", f"trainer.cache={work / 'cache'}",
    )  # fmt: skip
    bench.use_rows(config, asked.rows, SIZE)
    trainer = bench.trainer(config, asked.steps + WARM)
    once = prepare_again(bench, trainer, config, empty_folder(work / "again"))
    trainer.add_callback(times := StepTimes())
    empty_cache()
    trainer.train()
    cost = Cost(
        target, edge, int(trainer.rows.sizes([0])[0, 3]) * config.model.shape.image_seq_len, trainer.micro_batch,
        times.seconds / config.trainer.pairs_per_step, once / asked.rows,
        torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0,
    )  # fmt: skip
    bench.release(trainer)
    return cost


def prepare_again(bench: Bench, trainer: Any, config: Any, cache: Path) -> float:
    """Seconds for the rows' features or tiles and their reference, with kernels compiled and nothing cached."""
    from smolvlm_exp.engine.inputs.dataset import PackedDataset
    from smolvlm_exp.training.engine_setup import disk_cache, precompute_images

    store, rows = disk_cache(replace(config.trainer, cache=str(cache))), PackedDataset(bench.rows, bench.processor)
    began = time.perf_counter()
    precompute_images(rows, trainer.model, config.trainer, store, trainer.pixels)
    trainer.score_references(store)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smolvlm")
    parser.add_argument("--targets", default="text,recipe")
    parser.add_argument("--tiles", default="1,2,3,4", help="along the long edge")
    parser.add_argument("--rows", type=int, default=128, help="a multiple of 16, so that every step is full")
    parser.add_argument("--steps", type=int, default=7)
    asked = parser.parse_args()
    silence_upstream()
    asked.target = "text"
    bench, work = Bench(asked), empty_folder(Path("outputs/benchmark/resolution").resolve())
    tile = bench.config().model.shape.image_size
    costs = [
        measure(bench, target, tiles * tile, asked, work)
        for target in asked.targets.split(",")
        for tiles in map(int, asked.tiles.split(","))
    ]
    print(f"{machine()}\n\n{asked.model}:\n")
    print(f"| adapters | longest_edge | image tokens | micro-batch | s/pair | once, s/pair | "
          f"hours, {PAIRS:,} pairs | peak GiB |\n{'|---' * 8}|")  # fmt: skip
    for cost in costs:
        print(cost.row())


if __name__ == "__main__":
    main()
