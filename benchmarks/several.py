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
from smolvlm_exp.tasks.ranks import is_distributed
from smolvlm_exp.utils.distributed import destroy_distributed, gather, init_distributed, rank_world
from smolvlm_exp.utils.startup import silence_upstream

WARM = 3  # steps whose time does not count


class Watch:
    """How long the step loop waited for its batches, and each step's loss, which nobody waits for."""

    def __init__(self, trainer: Any) -> None:
        self.waited, self.losses = 0.0, list[torch.Tensor]()
        self.plain = trainer.get_batch_samples, trainer.training_step
        trainer.get_batch_samples, trainer.training_step = self.batches, self.step

    def batches(self, *args: Any) -> Any:
        begun = time.perf_counter()
        try:
            return self.plain[0](*args)
        finally:
            self.waited += (time.perf_counter() - begun) * (len(self.losses) >= WARM)

    def step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = self.plain[1](model, inputs, num_items_in_batch)
        if "step" in inputs:  # the others have nothing to do; see engine/packed_trainer.py
            self.losses.append(loss)
        return loss

    def loss(self) -> list[float]:
        """The mean over all processes, step by step."""
        return torch.tensor(gather(torch.stack(self.losses).tolist())).mean(0).tolist()


def measure(bench: Bench, target: str, pairs: int, asked: argparse.Namespace) -> dict[str, Any]:
    processes = rank_world()[1]
    config = bench.config(
        f"adapter.target={target}", "trainer.engine=shared", "trainer.gradient_checkpointing=false",
        "trainer.per_device_train_batch_size=1", f"trainer.gradient_accumulation_steps={pairs // processes}",
        f"trainer.memory_budget={'none' if asked.micro else 'auto'}",
    )  # fmt: skip
    trainer = bench.trainer(config, asked.steps, WARM)
    if asked.micro:
        trainer.micro_batch = asked.micro
    watch = Watch(trainer)
    trainer.train()
    seconds = trainer.clock.seconds
    found = {
        "cards": f"{processes} x {device_name()}",
        "sharded": trainer.is_fsdp_enabled,
        "pairs a step": pairs,
        "micro-batch": gather(trainer.micro_batch),
        "seconds a pair": seconds / pairs,
        "wait for data": watch.waited / (seconds * (asked.steps - WARM)),
        "peak": [round(peak, 2) for peak in gather(torch.cuda.max_memory_allocated() / GIB)],
        "loss": watch.loss(),
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
    silence_upstream()
    if is_distributed():
        init_distributed()
    asked.target = "text"
    bench, found = Bench(asked), {}
    for target, pairs in zip(asked.targets.split(","), map(int, asked.pairs.split(",")), strict=True):
        found[target] = measure(bench, target, pairs, asked)
        if rank_world()[0] == 0:
            print(target, json.dumps(found[target]), flush=True)
            if asked.json:
                Path(asked.json).write_text(json.dumps(found) + "\n", encoding="utf-8")
    if is_distributed():
        destroy_distributed()


if __name__ == "__main__":
    main()
