"""Stock TRL against the engine, side by side in one process: seconds a pair and peak memory of trainer.train()'s steps.

    python -m benchmarks.dpo --target recipe [--model smolvlm] [--only stock,hand,caps,lora] [--json FILE]

One base model in the real shape with random weights (nf4, double quantisation), the same rows for all: 512 x 384
pictures, answers of 40 to 200 tokens; sixteen pairs a step on the engine, four or eight on stock TRL. Parts:

stock   the published recipe as TRL runs it (its modules, micro-batch 1, checkpointing), then `--target`'s modules at
        other micro-batches, with and without checkpointing.
hand    the engine, `--target`'s modules, at every level of what layers keep and several micro-batches.
caps    the engine under a cap on what torch may allocate, so that a large card behaves like a small one, planned by
        trainer.memory_budget; beside it the best of `hand` and of `stock` whose peaks are below the cap.
lora    the engine's plan for the whole card once more, with LoRA in place of DoRA.

`--kernels` puts the device's own seconds beside the wall's, and says which kernels take them.

The first step of each is left out of time, of the engine's by plan the first half, in which CUDA graphs are captured;
what is measured first runs twice: a process's first minute is slow. The reference pass and kept features, which the
engine computes once a data set, are timed apart (`reference again` is what a sweep's second run waits for).
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.setting import GIB, Clock, compose, device_name, empty_cache, matmul_rate, rows
from smolvlm_exp.engine.memory.footprint import LEVELS, BatchLoad, MemorySpec, RowSizes
from smolvlm_exp.utils.startup import silence_upstream

CAPS = ("8GiB", "12GiB", "16GiB", "24GiB", "auto")
STOCK = ("1+", "2+", "4+", "8+", "1", "4")  # micro-batches; +: with checkpointing
HAND = (1, 4, 8, 16)
COMMON = (
    "model.weights=random", "quant=nf4", "adapter=dora", "adapter.init_lora_weights=gaussian", "trainer=dpo",
    "trainer.eval_strategy=no", "trainer.save_strategy=no", "trainer.memory_budget=none",
    "trainer.per_device_eval_batch_size=8", "trainer.dataloader_num_workers=4", "trainer.cache=outputs/benchmark/cache",
)  # fmt: skip


class Bench:
    """A base model and rows; trainers on them; what was measured."""

    algorithm = "dpo"
    again = True  # a trainer may train twice

    def __init__(self, asked: argparse.Namespace, common: tuple[str, ...] = COMMON) -> None:
        from smolvlm_exp.models.model import load_model
        from smolvlm_exp.models.quant import quantization_config

        self.target, self.common = asked.target, (f"model={asked.model}", *common)
        self.kernels = getattr(asked, "kernels", False)
        config = self.config()
        self.base = load_model(config.model, quantization_config(config.quant, torch.bfloat16))
        self.use_rows(config, asked.rows)
        self.rate, self.flops = matmul_rate(), 0.0
        self.found: list[dict[str, Any]] = []
        print(f"{device_name()}, torch {torch.__version__}: {self.rate / 1e12:.0f} TFLOP/s", flush=True)

    def use_rows(self, config: Any, count: int, size: tuple[int, int] = (512, 384)) -> None:
        """Rows for the next trainer, at the resolution that `config` asks for.

        Args:
            size: width and height of an image in pixels.
        """
        from smolvlm_exp.models.model import load_processor

        self.processor = load_processor(config.model)
        self.rows = rows(count, self.processor, size)

    def config(self, *overrides: str) -> Any:
        return compose(*self.common, *overrides)

    def trainer(self, config: Any, steps: int, warm: int = 1) -> Any:
        """A trainer as the pipeline builds it, with a clock."""
        from smolvlm_exp.data.preferences import Preferences
        from smolvlm_exp.evaluation.held_out import HeldOut
        from smolvlm_exp.models.adapter import check_adapter_target, lora_config
        from smolvlm_exp.training.arguments import TrainerInputs

        algorithm = import_module(f"smolvlm_exp.training.{self.algorithm}")
        folder = Path("outputs/benchmark")
        folder.mkdir(parents=True, exist_ok=True)
        peft_config = lora_config(config.adapter, quantised=True)
        assert peft_config is not None
        check_adapter_target(peft_config, self.base, config.adapter.target)
        config.trainer.max_steps = steps
        arguments = algorithm.build_arguments(config.trainer, folder, "bfloat16", None, 0)
        clock = Clock(warm)
        held_out = HeldOut(Preferences(self.rows, self.rows, {}), self.processor, 1, None)
        parts = TrainerInputs(self.base, peft_config, held_out, [clock], folder, self.rewards())
        trainer: Any = algorithm.build_trainer(config.trainer, arguments, parts)
        trainer.clock = clock
        return trainer

    def rewards(self) -> Any:
        """Of an algorithm that samples answers."""
        return None

    def measure(self, trainer: Any, **what: Any) -> dict[str, Any]:
        """Train, and note down `what` was measured, printed at once."""
        if not self.found and self.again:
            trainer.train()
        empty_cache()
        found: dict[str, Any] = dict(what)
        try:
            trainer.train()
            pairs = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
            found["seconds"] = trainer.clock.seconds / pairs
            found["first loss"] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
            if self.rate:
                found["peak"] = torch.cuda.max_memory_allocated() / GIB
            if self.rate and self.kernels:
                found |= device_work(trainer, pairs)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            found["seconds"] = None  # out of memory
        self.found.append(found)
        print(json.dumps(found), flush=True)
        return found

    def release(self, trainer: Any) -> None:
        self.base = trainer.model.unload()
        self.base.gradient_checkpointing_disable()
        for module in self.base.modules():  # with checkpointing embeddings ask for gradients; upstream never undoes it
            module._forward_hooks.clear()
        trainer.model = trainer.model_wrapped = trainer.optimizer = None
        empty_cache()


def device_work(trainer: Any, pairs: int) -> dict[str, Any]:
    """Seconds of kernels a pair, kernels a step, and the longest's milliseconds a step; of CUDA graphs' kernels too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        trainer.train()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    steps, times = trainer.state.global_step, defaultdict[str, float](float)
    for event in on_device:
        if not event.name.startswith("Mem"):
            times[event.name[:60]] += event.device_time / 1e3 / steps
    longest = {name: round(times[name], 1) for name in sorted(times, key=lambda name: -times[name])[:20]}
    kernels = round(sum(times.values()) / 1e3 / pairs, 5)
    return {"kernels": kernels, "kernels a step": round(len(on_device) / steps), "longest": longest}


def stock(bench: Bench, settings: list[str]) -> None:
    """The recipe as TRL runs it, and its other settings."""
    for target, setting in dict.fromkeys((("recipe", "1+"), *((bench.target, each) for each in settings))):
        micro, checkpointing = int(setting.removesuffix("+")), setting.endswith("+")
        accumulation = max(4 // micro, 1)
        trainer = bench.trainer(
            bench.config(
                f"adapter.target={target}", "trainer.engine=stock", f"trainer.gradient_checkpointing={checkpointing}",
                f"trainer.per_device_train_batch_size={micro}", f"trainer.gradient_accumulation_steps={accumulation}",
            ), steps=3,
        )  # fmt: skip
        bench.measure(trainer, engine="stock", target=target, micro=micro, checkpointing=checkpointing)
        bench.release(trainer)


def engine(bench: Bench, parts: list[str], steps: int) -> None:
    """What the engine does by hand and by plan, on one trainer."""
    from smolvlm_exp.training.memory_budget import plan_memory, spec_of_model

    adapter = f"adapter.target={bench.target}"
    shared = (
        "trainer.engine=shared", "trainer.gradient_checkpointing=false", "trainer.per_device_train_batch_size=1",
        "trainer.gradient_accumulation_steps=16",
    )  # fmt: skip
    config = bench.config(adapter, *shared)
    begun = time.perf_counter()
    trainer = bench.trainer(config, steps=len(bench.rows) // 16)  # so that all rows are prepared
    trainer.args.max_steps = 2
    print(f"built in {time.perf_counter() - begun:.1f} s", flush=True)
    facts = spec_of_model(trainer, gpu=bool(bench.rate))
    bench.flops = useful(facts, RowSizes(trainer.rows.sizes(range(len(trainer.rows))).tolist()).average(1))
    reference_again(bench, trainer, config)
    if "hand" in parts:
        hand(bench, trainer, facts)
    if "caps" in parts:
        caps(bench, trainer, config, steps)
    bench.release(trainer)
    if "lora" in parts:
        config = bench.config("adapter=lora", adapter, *shared)
        trainer = bench.trainer(config, len(bench.rows) // 16)
        trainer.args.max_steps, trainer.clock.warm = steps, steps // 2
        plan_memory(replace(config.trainer, memory_budget="auto"), trainer)
        bench.measure(trainer, engine="lora", target=bench.target, micro=trainer.micro_batch)
        bench.release(trainer)


def use(trainer: Any, facts: MemorySpec, micro: int, checkpointing: str) -> None:
    from smolvlm_exp.engine.layers.fuse import fuse

    trainer.micro_batch = micro
    fuse(trainer.model, checkpointing, checkpointing if facts.vision.trained else "full")


def hand(bench: Bench, trainer: Any, facts: MemorySpec) -> None:
    for checkpointing in LEVELS:
        for micro in HAND:
            use(trainer, facts, micro, checkpointing)
            found = bench.measure(
                trainer, engine="shared", by="hand", target=bench.target, micro=micro, checkpointing=checkpointing
            )
            if found["seconds"] is None or trainer.micro_batch != micro:
                found["seconds"] = None  # it recovered: no measurement of what was asked for
                break


def caps(bench: Bench, trainer: Any, config: Any, steps: int) -> None:
    from smolvlm_exp.training.memory_budget import memory_cap, plan_memory

    trainer.args.max_steps, trainer.clock.warm = steps, steps // 2
    for cap in CAPS:
        with memory_cap(cap):
            plan_memory(replace(config.trainer, memory_budget=cap), trainer)
            planned = trainer.micro_batch
            found = bench.measure(trainer, engine="shared", by="plan", target=bench.target, cap=cap, micro=planned)
            found["out of memory"] = trainer.micro_batch != planned


def reference_again(bench: Bench, trainer: Any, config: Any) -> None:
    """What a second run of a sweep waits for its reference; its adapter is fresh too."""
    from smolvlm_exp.training.engine_setup import disk_cache

    begun = time.perf_counter()
    trainer.score_references(disk_cache(config.trainer))
    bench.found.append({"reference again": time.perf_counter() - begun})
    print(json.dumps(bench.found[-1]), flush=True)


def useful(facts: MemorySpec, load: BatchLoad) -> float:
    """FLOPs a pair of the mathematics, done once: frozen weights take one product forward and one backward."""
    flops = 4.0 * facts.vocabulary * facts.text.hidden * load.answers
    stacks = [(facts.text, load.tokens, load.scores)]
    if not facts.features:
        stacks.append((facts.vision, load.tiles * facts.patches, load.tiles * facts.patches**2))
    for stack, tokens, scores in stacks:
        flops += 2 * sum(stack.matrices) * tokens * (stack.layers + stack.trained)
        flops += 4 * stack.queries * scores * (stack.layers + 2.5 * stack.trained)
    return flops


def table(bench: Bench) -> None:
    """Seconds a pair, ratio to the recipe as TRL runs it, share of the card's matmul rate, peak; then cap by cap."""
    measured = [each for each in bench.found if each.get("seconds")]
    recipe = next((each["seconds"] for each in measured if each["engine"] == "stock"), None)
    print("\n| setting | seconds a pair | x recipe | share of matmul rate | peak GiB |\n|---|---|---|---|---|")
    for each in measured:
        words = " ".join(f"{k}={v}" for k, v in each.items() if k not in ("seconds", "peak", "first loss", "longest"))
        ratio = f"{recipe / each['seconds']:.1f}" if recipe else ""
        share = f"{bench.flops / each['seconds'] / bench.rate:.1%}" if bench.rate else ""
        print(f"| {words} | {each['seconds']:.4f} | {ratio} | {share} | {each.get('peak', 0):.2f} |")
    for plan in (each for each in measured if each.get("by") == "plan"):
        room = float(plan["cap"].removesuffix("GiB")) if plan["cap"] != "auto" else float("inf")
        fitting = [each for each in measured if each.get("peak", 0) <= room]
        by_hand = min((each["seconds"] for each in fitting if each.get("by") == "hand"), default=float("nan"))
        by_stock = {
            target: min((e["seconds"] for e in fitting if e["engine"] == "stock" and e["target"] == target), default=0)
            for target in ("recipe", bench.target)
        }
        ratios = ", ".join(f"{s / plan['seconds']:.1f} x stock's best with {t}" for t, s in by_stock.items())
        print(f"cap {plan['cap']}: {by_hand / plan['seconds']:.0%} of the best by hand; {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smolvlm")
    parser.add_argument("--target", default="recipe", choices=("recipe", "text"))
    parser.add_argument("--only", default="stock,hand,caps,lora")
    parser.add_argument("--rows", type=int, default=64, help="a multiple of 16, so that every step is full")
    parser.add_argument("--steps", type=int, default=6, help="of caps and lora; more where they are short")
    parser.add_argument("--json", default=None)
    parser.add_argument("--kernels", action="store_true", help="seconds and number of kernels too, by a profiler")
    parser.add_argument("--stock", default=",".join(STOCK), help="micro-batches; 4+: with checkpointing")
    asked = parser.parse_args()
    silence_upstream()
    bench, parts = Bench(asked), asked.only.split(",")
    if "stock" in parts:
        stock(bench, asked.stock.split(","))
    if parts != ["stock"]:
        engine(bench, parts, asked.steps)
    table(bench)
    if asked.json:
        Path(asked.json).write_text(json.dumps(bench.found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
