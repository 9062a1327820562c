"""One GPU against several: the loss curve at the same effective batch, seconds a pair, the wait for data.

    python -m benchmarks.several --micro 8 --json one.json
    accelerate launch --num_processes 2 -m benchmarks.several --json two.json
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 ... -m benchmarks.several --targets text --pairs 32
    python -m benchmarks.several --compare one.json again.json two.json sharded.json

SmolVLM-Instruct's shape with random weights, nf4, DoRA, the rows of benchmarks/dpo.py. `--compare` takes the first two
as runs of one GPU that add up in another order: how far they drift apart is what rounding does.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.dpo import Bench
from benchmarks.setting import GIB, device_name
from smolvlm_exp import launch
from smolvlm_exp.engine.group import gather, place
from smolvlm_exp.quiet import hush


class Waits:
    """Seconds that the step loop waited for its batches."""

    def __init__(self, trainer: Any) -> None:
        self.seconds, self.plain = 0.0, trainer.get_batch_samples
        trainer.get_batch_samples = self

    def __call__(self, *args: Any) -> Any:
        begun = time.perf_counter()
        try:
            return self.plain(*args)
        finally:
            self.seconds += time.perf_counter() - begun


def measure(bench: Bench, target: str, pairs: int, asked: argparse.Namespace) -> dict[str, Any]:
    processes = place()[1]
    config = bench.config(
        f"adapter.target={target}", "trainer.engine=shared", "trainer.gradient_checkpointing=false",
        "trainer.per_device_train_batch_size=1", f"trainer.gradient_accumulation_steps={pairs // processes}",
        f"trainer.memory_budget={'none' if asked.micro else 'auto'}",
    )  # fmt: skip
    trainer = bench.trainer(config, steps=asked.steps)
    if asked.micro:
        trainer.micro_batch = asked.micro
    waits = Waits(trainer)
    trainer.train()
    ends = trainer.clock.ends
    found = {
        "cards": f"{processes} x {device_name()}",
        "sharded": trainer.is_fsdp_enabled,
        "pairs a step": pairs,
        "micro-batch": gather(trainer.micro_batch),
        "seconds a pair": (ends[-1] - ends[2]) / (pairs * (len(ends) - 3)),
        "wait for data": waits.seconds / (ends[-1] - ends[0]),
        "peak": [round(peak, 2) for peak in gather(torch.cuda.max_memory_allocated() / GIB)],
        "loss": [event["loss"] for event in trainer.state.log_history if "loss" in event],
    }
    if not trainer.is_fsdp_enabled:
        bench.release(trainer)
    return found


def compare(files: list[str]) -> None:
    """A line for each run: the ratio to the first one's speed, and how far its losses are from it, step by step."""
    runs = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    for target in runs[0]:
        first = runs[0][target]
        for file, run in zip(files, runs, strict=True):
            if target not in run:
                continue
            found = run[target]
            off = torch.tensor([abs(mine - one) for mine, one in zip(found["loss"], first["loss"], strict=False)])
            print(
                f"{target:7} {Path(file).stem:10} {found['cards']}, {found['micro-batch']} pairs at a time, peak "
                f"{found['peak']} GiB: {found['seconds a pair']:.4f} s a pair, "
                f"{first['seconds a pair'] / found['seconds a pair']:.2f} x, waits {found['wait for data']:.1%}; "
                f"loss {found['loss'][0]:.4f} to {found['loss'][-1]:.4f}, off by {off.mean():.4f}, most {off.max():.4f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smolvlm")
    parser.add_argument("--targets", default="text,recipe")
    parser.add_argument("--pairs", default="32,16", help="a step, for each target")
    parser.add_argument("--micro", type=int, default=0, help="0: planned")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--json", default=None)
    parser.add_argument("--compare", nargs="+", default=[])
    asked = parser.parse_args()
    if asked.compare:
        compare(asked.compare)
        return
    hush()
    if launch.several():
        launch.meet()
    asked.target = "text"
    bench, found = Bench(asked), {}
    for target, pairs in zip(asked.targets.split(","), map(int, asked.pairs.split(",")), strict=True):
        found[target] = measure(bench, target, pairs, asked)
        if place()[0] == 0:
            print(target, json.dumps(found[target]), flush=True)
            if asked.json:
                Path(asked.json).write_text(json.dumps(found) + "\n", encoding="utf-8")
    if launch.several():
        launch.leave()


if __name__ == "__main__":
    main()
