"""Stock TRL against the engine, side by side: seconds a pair and peak memory of optimiser steps in trainer.train().

    python -m benchmarks.dpo [--model smolvlm] [--only stock,text] [--json FILE]

One process, one base model in the real shape with random weights (nf4, double quantisation), the same rows for all:
512 x 384 pictures, answers of 40 to 200 tokens. Stock TRL runs as the published recipe runs it (micro-batch 1,
checkpointing) and at the largest micro-batch that a cap lets through. A cap is torch's own limit on what the process
may allocate, so that a large card behaves like a small one. Collation is given eight worker processes either way. The
reference pass and the kept features, which the engine computes once a data set, are timed apart.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

GIB = 2**30
WORDS = (
    "the",
    "small",
    "red",
    "star",
    "stands",
    "beside",
    "a",
    "large",
    "blue",
    "moon",
    "and",
    "two",
    "green",
    "arrows",
)


class Clock(TrainerCallback):
    """When each optimiser step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) == 1:
            torch.cuda.reset_peak_memory_stats()


def rows(count: int, processor: Any) -> Any:
    """Preference rows in the normal form."""
    from datasets import Dataset, Features, Image, List, Value
    from PIL import Image as Pictures

    from smolvlm_exp.data.preferences import assistant, user

    draw = np.random.default_rng(0)

    def answer(tokens: int) -> str:
        text = ""
        while len(processor.tokenizer(text)["input_ids"]) < tokens:
            text += " " + " ".join(draw.choice(WORDS, 4))
        return text.strip()

    message = [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}]
    features = Features(images=List(Image()), prompt=message, chosen=message, rejected=message)
    made = []
    for _ in range(count):
        noise = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Pictures.fromarray(noise).resize((512, 384))
        chosen, rejected = (answer(int(draw.integers(40, 200))) for _ in range(2))
        made.append({
            "images": [picture],
            "prompt": [user("What is in this picture?")],
            "chosen": [assistant(chosen)],
            "rejected": [assistant(rejected)],
        })  # fmt: skip
    return Dataset.from_list(made, features=features)


def compose(*overrides: str) -> Any:
    from smolvlm_exp.command import check_command

    return check_command(SimpleNamespace(
        overrides=["trainer=dpo", "tracker=none", *overrides], multirun=False, config_path=None, config_name=None,
        config_dir=None,
    ))[0]  # fmt: skip


def cap(gib: float | None) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * GIB / total)


def run(base: Any, processor: Any, data: Any, config: Any, cap_gib: float | None, micro: int, keep: str) -> dict:
    """Some optimiser steps; the first is left out of the time."""
    from smolvlm_exp.adapter import lora_config
    from smolvlm_exp.data.preferences import Preferences
    from smolvlm_exp.engine.fused import fuse
    from smolvlm_exp.training import dpo
    from smolvlm_exp.training.common import Parts, Run

    folder = Path("outputs/benchmark")
    folder.mkdir(parents=True, exist_ok=True)
    clock, peft_config = Clock(), lora_config(config.adapter, quantised=True)
    cap(None)
    arguments = dpo.build_arguments(config.trainer, Run(folder, 0, torch.bfloat16, None))
    parts = Parts(base, processor, peft_config, Preferences(data, data, {}), [clock], folder)
    begun = time.perf_counter()
    trainer: Any = dpo.build_trainer(config.trainer, arguments, parts)
    if config.trainer.engine == "shared":
        trainer.micro_batch = micro
        fuse(trainer.model, keep, keep)
    built = time.perf_counter() - begun
    gc.collect()
    torch.cuda.empty_cache()
    cap(cap_gib)
    found: dict[str, Any] = {"engine": config.trainer.engine, "micro": micro, "kept": keep, "cap": cap_gib}
    found |= {"target": config.adapter.target, "dora": config.adapter.use_dora}
    try:
        trainer.train()
        steps = len(clock.ends) - 1
        pairs = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * steps
        found["seconds_a_pair"] = (clock.ends[-1] - clock.ends[0]) / pairs
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["first_loss"] = trainer.state.log_history[0]["loss"]
        found["seconds_to_build"] = built
        if getattr(trainer, "micro_batch", micro) != micro:
            found["micro"] = trainer.micro_batch
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        found["seconds_a_pair"] = None
    trainer.model.unload()
    del trainer, parts
    gc.collect()
    torch.cuda.empty_cache()
    return found


def matmul_rate() -> float:
    """Measured FLOP/s of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 2 * 8192**3 * 20 / (time.perf_counter() - begun)


def cases(asked: Any) -> list[tuple[list[str], float | None, int, str]]:
    """(overrides, cap in GiB, micro-batch, what the engine keeps)."""
    from_ = ["adapter=dora", "adapter.init_lora_weights=gaussian"]
    stock = ["trainer.engine=stock", "trainer.gradient_checkpointing=true", "trainer.gradient_accumulation_steps=8"]
    listed: list[tuple[list[str], float | None, int, str]] = []
    if "stock" in asked.only:
        listed.append(([*from_, *stock, "adapter.target=recipe"], None, 1, "inputs"))
        two = [*stock[:2], "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=4"]
        listed.append(([*from_, *two, "adapter.target=recipe"], 8, 2, "inputs"))
    batch = ["trainer.engine=shared", "trainer.gradient_checkpointing=false", "trainer.gradient_accumulation_steps=16"]
    for target, free, tight in (("recipe", 8, 4), ("text", 16, 16)):
        if target in asked.only:
            listed.append(([*from_, *batch, f"adapter.target={target}"], None, free, "everything"))
            listed.append(([*from_, *batch, f"adapter.target={target}"], 8, tight, "inputs"))
    if "lora" in asked.only:
        listed.append((["adapter=lora", *batch, "adapter.target=text"], None, 16, "everything"))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smolvlm")
    parser.add_argument("--only", default="stock,recipe,text,lora")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", default=None)
    asked = parser.parse_args()

    from smolvlm_exp.command import register_schemas
    from smolvlm_exp.model import load_model, load_processor
    from smolvlm_exp.quant import quantization_config

    register_schemas()
    common = [
        f"model={asked.model}", "model.weights=random", "quant=nf4", f"trainer.max_steps={asked.steps}",
        "trainer.logging_steps=1", "trainer.eval_strategy=no", "trainer.save_strategy=no",
        "trainer.dataloader_num_workers=8", "trainer.memory_budget=none",
    ]  # fmt: skip
    first = compose(*common)
    base = load_model(first.model, quantization_config(first.quant, torch.bfloat16))
    processor = load_processor(first.model)
    data = rows(asked.rows, processor)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {matmul_rate() / 1e12:.0f} TFLOP/s", flush=True)
    results = []
    for overrides, cap_gib, micro, keep in cases(asked):
        results.append(run(base, processor, data, compose(*common, *overrides), cap_gib, micro, keep))
        print(json.dumps(results[-1]), flush=True)
    if asked.json:
        Path(asked.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
