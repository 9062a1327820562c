"""Fifty steps in bfloat16: the engine's loss curve beside two of stock TRL that add up in another order.

    python -m benchmarks.curve [--adapter dora] [--steps 50] [--json FILE]

The embedded model, nf4, an adapter on the text model, sixteen pairs a step, the same rows in the same order for all.
Stock TRL runs with micro-batches of 16 and of 4 and with transformers' eager attention, which is the same mathematics;
how far these drift apart is what the order of sums does. It runs in float32 too: how far each is from that is what
rounding does. Needs a GPU.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from benchmarks.setting import compose, device_name, empty_cache
from smolvlm_exp.utils.startup import silence_upstream

COMMON = (
    "trainer.loss_type=[sigmoid]", "trainer.loss_weights=null", "trainer.logging_steps=1",
    "trainer.eval_strategy=no", "trainer.save_strategy=no", "trainer.memory_budget=none",
    "trainer.gradient_checkpointing=false", "data.train_rows=800",
)  # fmt: skip
STOCK = {
    "stock, 16 at a time": ("stock", 16, "bfloat16", "sdpa"),
    "stock, 4 at a time": ("stock", 4, "bfloat16", "sdpa"),
    "stock, eager attention": ("stock", 16, "bfloat16", "eager"),
}
SETTINGS = STOCK | {
    "engine": ("shared", 16, "bfloat16", "sdpa"),
    "stock, float32": ("stock", 16, "float32", "sdpa"),
    "engine, float32": ("shared", 16, "float32", "sdpa"),
}


def losses(adapter: str, steps: int, engine: str, micro: int, dtype: str, attention: str) -> list[float]:
    """The loss of each step of a run of its own."""
    from smolvlm_exp.data.preferences import load_preferences
    from smolvlm_exp.evaluation.held_out import HeldOut
    from smolvlm_exp.models.adapter import check_adapter_target, lora_config
    from smolvlm_exp.models.model import load_model, load_processor, resolve_dtype
    from smolvlm_exp.models.quant import quantization_config
    from smolvlm_exp.training import dpo
    from smolvlm_exp.training.arguments import TrainerInputs

    folder = Path("outputs/benchmark")
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = compose(
        *COMMON, f"adapter={adapter}", f"model.dtype={dtype}", f"model.attn_implementation={attention}",
        f"trainer.engine={engine}", f"trainer.max_steps={steps}",
        f"trainer.per_device_train_batch_size={micro}", f"trainer.gradient_accumulation_steps={16 // micro}",
    )  # fmt: skip
    arguments = dpo.build_arguments(config.trainer, folder, dtype, None, 0)
    model = load_model(config.model, quantization_config(config.quant, resolve_dtype(dtype)))
    processor, peft_config = load_processor(config.model), lora_config(config.adapter, quantised=True)
    assert peft_config is not None
    check_adapter_target(peft_config, model, config.adapter.target)
    held_out = HeldOut(load_preferences(config.data, processor, folder), processor, 1, None)
    trainer = dpo.build_trainer(config.trainer, arguments, TrainerInputs(model, peft_config, held_out, [], folder))
    trainer.train()
    empty_cache()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="dora", choices=("dora", "lora"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", default=None)
    asked = parser.parse_args()
    silence_upstream()
    found = {name: losses(asked.adapter, asked.steps, *setting) for name, setting in SETTINGS.items()}
    curves = {name: torch.tensor(found[name]) for name in SETTINGS}
    print(f"{device_name()}, torch {torch.__version__}, {asked.adapter}; loss at steps 1, 10, 20, ...")
    for name, curve in found.items():
        print(f"{name:22}", *(f"{curve[i]:.4f}" for i in (0, *range(9, len(curve), 10))))
    for name, other in combinations(SETTINGS, 2):
        off = (curves[name] - curves[other]).abs()
        print(f"{name} from {other}: mean {off.mean():.4f}, greatest {off.max():.4f}")
    stock = torch.stack([curves[name] for name in STOCK])
    for name in SETTINGS.keys() - STOCK.keys():
        inside = (curves[name] >= stock.amin(0)) & (curves[name] <= stock.amax(0))
        print(f"{name}: {int(inside.sum())} of {len(inside)} steps between the least and the greatest of stock's")
    if asked.json:
        Path(asked.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
