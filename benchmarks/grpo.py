"""GRPO steps of stock TRL and of the engine, side by side in one process: seconds an answer and peak memory.

    python -m benchmarks.grpo [--model smolvlm] [--only engine,cap,stock,stock8,generous] [--tokens 128]
    python -m benchmarks.grpo --model tiny --tokens 16 --rows 16      a minute or two on a CPU

One base model in the real shape with random weights (nf4, double quantisation), DoRA r=8 on the text model, the same
rows for all: 512 x 384 images, groups of eight answers, sampled anew at every step. Random weights hardly ever draw the
end token, so answers have --tokens tokens. Rewards are arbitrary numbers, different from answer to answer.

engine    one prompt a step, and eight prompts a step; the share of a step that is sampling
cap       the engine with eight prompts a step under --cap, planned by trainer.memory_budget
stock     plain TRL, one prompt a step: all eight answers in one pass, and in micro-batches of two
stock8    plain TRL, eight prompts a step, whose 64 answers are sampled together
generous  stock8 as kindly as its settings allow: LoRA in place of DoRA, no checkpointing

The first step of each is left out, and of the very first three.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.dpo import Bench
from benchmarks.setting import rows
from smolvlm_exp.utils.startup import silence_upstream

GROUP = 8
COMMON = (
    "model.weights=random", "quant=nf4", "adapter=dora", "adapter.target=text", "adapter.r=8", "trainer=grpo",
    f"trainer.num_generations={GROUP}", "trainer.mask_truncated_completions=false", "trainer.save_strategy=no",
    "trainer.memory_budget=none", "trainer.gradient_checkpointing=false", "trainer.cache=outputs/benchmark/cache",
)  # fmt: skip


def arbitrary(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
    return [sum(ids) % 11 / 10 for ids in completion_ids]


class GRPOBench(Bench):
    algorithm = "grpo"
    again = False  # TRL's sampler would go on to other prompts

    def use_rows(self, config: Any, count: int, size: tuple[int, int] = (512, 384)) -> None:
        from smolvlm_exp.models.model import load_processor

        self.processor = load_processor(config.model)
        made = rows(count, self.processor, size)
        self.rows = made.add_column("truth", ['{"kind": "answer", "answer": "a star"}'] * count)

    def rewards(self) -> Any:
        from smolvlm_exp.rewards.build import Rewards

        return Rewards({"arbitrary": arbitrary}, {"arbitrary": 1.0}, "sum_then_normalize", {})

    def run(self, name: str, steps: int, *overrides: str, warm: int = 1) -> None:
        """Build, train, note down, release."""
        trainer = self.trainer(self.config(*overrides), steps, warm)
        found = self.measure(trainer, setting=name, micro=getattr(trainer, "micro_batch", None))
        events = [event for event in trainer.state.log_history if "sampling_time" in event][warm:]
        if events and found["seconds"]:
            sampling = sum(event["sampling_time"] for event in events) / len(events)
            answers = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
            found["sampling"] = sampling / (found["seconds"] * answers)
        self.release(trainer)


def batch(answers: int, together: int = GROUP) -> tuple[str, str]:
    """Settings for a step of so many answers, `together` in one pass of stock TRL."""
    return (
        f"trainer.per_device_train_batch_size={together}",
        f"trainer.gradient_accumulation_steps={answers // together}",
    )


def table(bench: Bench) -> None:
    """Seconds a group of eight and an answer, share that is sampling, peak."""
    stock = {each["setting"]: each["seconds"] for each in bench.found if each.get("seconds")}
    print("\n| setting | s a group of 8 | s an answer | sampling | peak GiB |\n|---|---|---|---|---|")
    for each in bench.found:
        if not each.get("seconds"):
            print(f"| {each['setting']} | out of memory | | | |")
            continue
        share = f"{each['sampling']:.0%}" if "sampling" in each else ""
        seconds = each["seconds"]
        print(f"| {each['setting']} | {GROUP * seconds:.3f} | {seconds:.4f} | {share} | {each.get('peak', 0.0):.2f} |")
    compared = [("engine, 1 prompt", "stock, 1 prompt"), ("engine, 8 prompts", "stock, 1 prompt")]
    compared += [("engine, 8 prompts", f"{kind}, 8 prompts") for kind in ("stock", "generous stock")]
    for ours, theirs in compared:
        if ours in stock and theirs in stock:
            print(f"{ours}: {stock[theirs] / stock[ours]:.1f} x {theirs}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smolvlm")
    parser.add_argument("--only", default="engine,cap,stock,stock8,generous")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--rows", type=int, default=64, help="at least eight for each step")
    parser.add_argument("--cap", default="8GiB")
    asked = parser.parse_args()
    asked.target = "text"
    silence_upstream()
    tokens = f"trainer.max_completion_length={asked.tokens}"
    bench, parts = GRPOBench(asked, (*COMMON, tokens)), asked.only.split(",")
    stock = "trainer.engine=stock"
    if "engine" in parts:
        bench.run("engine, 1 prompt", 8, *batch(GROUP), warm=3)  # what compiles comes first
        bench.run("engine, 8 prompts", 4, *batch(8 * GROUP), "trainer.memory_budget=auto")
    if "cap" in parts:
        cap(bench, asked.cap)
    if "stock" in parts:
        bench.run("stock, 1 prompt", 2, stock, *batch(GROUP))
        bench.run("stock, 1 prompt, micro-batch 2", 2, stock, *batch(GROUP, 2))
    if "stock8" in parts:
        bench.run("stock, 8 prompts", 2, stock, *batch(8 * GROUP))
    if "generous" in parts:
        bench.run("generous stock, 8 prompts", 2, stock, "adapter=lora", *batch(8 * GROUP))
    table(bench)


def cap(bench: GRPOBench, size: str) -> None:
    from smolvlm_exp.training.memory_budget import memory_cap

    with memory_cap(size):
        bench.run(f"engine, 8 prompts, {size}", 3, *batch(8 * GROUP), f"trainer.memory_budget={size}")
        bench.run(f"engine, 1 prompt, {size}", 3, *batch(GROUP), f"trainer.memory_budget={size}")


if __name__ == "__main__":
    main()
