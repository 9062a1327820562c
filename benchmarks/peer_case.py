"""One case of benchmarks/peer.py, in a process of its own: build the trainer, train some steps, print a JSON line.

    python -m benchmarks.peer_case unsloth/smolvlm/text/4+ --weights FOLDER --folder FOLDER [--steps 3]

Nothing is imported before a case is known: Unsloth must come before transformers, whose classes it replaces, and its
environment has neither smolvlm_exp nor the versions that need it.
"""

import argparse
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PAIRS = 16  # a step
LORA = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
TEXT = r".*text_model.*\.(q|k|v|o|gate|up|down)_proj"
# What Unsloth adapts with finetune_vision_layers off and on: the layers of one stack or both, without the connector.
MODULES = {"text": TEXT, "all": rf"{TEXT}|.*vision_model.*\.((q|k|v|out)_proj|fc[12])"}
MAX_LENGTH = 2048  # tokens: Unsloth's default, longer than every row
WORKERS = 8  # that cut tiles: with none, the default, the GPU waits for one core
ENGINE_STEPS = 8  # its steps take less than a second
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "unsloth", "liger-kernel")


@dataclass(frozen=True)
class Case:
    """What its name says: part/model/target/setting[/cap]."""

    part: str  # a function below
    model: str  # of conf/model
    target: str  # of MODULES
    setting: str  # micro-batch, with + for activation checkpointing; auto: the engine's own plan
    cap: str | None = None  # on the memory that torch may allocate: 8GiB

    @classmethod
    def named(cls, name: str) -> "Case":
        return cls(*name.split("/"))

    @property
    def micro(self) -> int:
        return int(self.setting.removesuffix("+"))

    @property
    def checkpointing(self) -> bool:
        return self.setting.endswith("+")


def unsloth(case: Case, weights: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Unsloth's FastVisionModel in TRL's trainer, which importing it replaces: its PatchDPOTrainer() is empty now."""
    from unsloth import FastVisionModel

    limit_memory(case.cap)
    from trl import DPOConfig, DPOTrainer

    checkpointing = "unsloth" if case.checkpointing else False
    model, processor = FastVisionModel.from_pretrained(
        str(weights), load_in_4bit=True, max_seq_length=MAX_LENGTH, use_gradient_checkpointing=checkpointing
    )
    model = FastVisionModel.get_peft_model(
        model, finetune_vision_layers=case.target == "all", use_gradient_checkpointing=checkpointing, **LORA
    )
    build = partial(DPOTrainer, model, processing_class=processor)
    return train(build, DPOConfig, case, folder, steps)


def trl(case: Case, weights: Path, folder: Path, steps: int, liger: bool = False) -> dict[str, Any]:
    """Plain TRL, whose fused head never has all logits in memory."""
    from peft import LoraConfig
    from transformers import AutoProcessor
    from trl import DPOConfig, DPOTrainer

    from benchmarks.plain_trl import load_model

    limit_memory(case.cap)
    model = load_model(str(weights))
    if liger:
        use_liger_layers(model)
    build = partial(
        liger_trainer() if liger else DPOTrainer, model,
        processing_class=AutoProcessor.from_pretrained(weights),
        peft_config=LoraConfig(target_modules=MODULES[case.target], **LORA),
    )  # fmt: skip
    return train(build, DPOConfig, case, folder, steps)


def liger(case: Case, weights: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Plain TRL with liger-kernel's DPO loss and layers, put in by hand.

    TRL has no setting for the loss any more (its fused head took the place), and its `use_liger_kernel` changes nothing
    here: liger-kernel knows the model type `smolvlm` but not `idefics3`, which SmolVLM's first family is.
    """
    return trl(case, weights, folder, steps, liger=True)


def use_liger_layers(model: Any) -> None:
    """The layers that `use_liger_kernel` replaces in a `smolvlm`: rotary embedding, MLP and norms."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from liger_kernel.transformers.monkey_patch import _patch_layer_norm_module

    apply_liger_kernel_to_llama(model=model.model.text_model, fused_linear_cross_entropy=False)
    vision = model.model.vision_model
    norms = [norm for layer in vision.encoder.layers for norm in (layer.layer_norm1, layer.layer_norm2)]
    for norm in (*norms, vision.post_layernorm):
        _patch_layer_norm_module(norm)


def liger_trainer() -> type:
    """TRL's trainer with liger-kernel's loss, as TRL called it when it had a setting for that."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    from trl import DPOTrainer

    class LigerDPOTrainer(DPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> torch.Tensor:
            inputs = {**inputs, "use_cache": False}
            answers = inputs.pop("completion_mask")[:, 1:].bool()
            targets = inputs["input_ids"][:, 1:].masked_fill(~answers, -100)
            adapted = self.accelerator.unwrap_model(model)
            base = adapted.get_base_model()
            with self.accelerator.autocast():
                policy = base.model(**inputs).last_hidden_state[:, :-1]
                with torch.no_grad(), adapted.disable_adapter():
                    reference = base.model(**inputs).last_hidden_state[:, :-1]
            head = base.lm_head.weight
            loss = LigerFusedLinearDPOLoss(beta=self.beta)
            return loss(head, policy, targets, ref_input=reference, ref_weight=head)[0]

    return LigerDPOTrainer


def train(build: Any, config_class: Any, case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Steps of TRL's trainer; the first is left out of time.

    Args:
        build: the trainer, when it is given arguments, rows and callbacks.
    """
    import torch

    from benchmarks.setting import GIB, Clock

    gpu = torch.cuda.is_available()
    arguments = config_class(
        output_dir=str(folder / "out"), report_to="none", save_strategy="no", logging_steps=1, max_steps=steps,
        per_device_train_batch_size=case.micro, gradient_accumulation_steps=PAIRS // case.micro,
        gradient_checkpointing=case.checkpointing, learning_rate=5e-6, max_length=MAX_LENGTH, bf16=gpu, use_cpu=not gpu,
        dataloader_num_workers=WORKERS,
    )  # fmt: skip
    trainer = build(args=arguments, train_dataset=read_rows(case, folder), callbacks=[clock := Clock(warm=1)])
    trained = count_trained(trainer.model)
    trainer.train()
    found = {"seconds": clock.seconds / PAIRS, "first loss": first_loss(trainer), "trained": trained}
    return found | ({"peak": torch.cuda.max_memory_allocated() / GIB} if gpu else {})


def engine(case: Case, weights: Path, folder: Path, steps: int) -> dict[str, Any]:
    """The engine as a run plans it; `once` is what it works out before training, seconds a pair.

    It trains twice, as in benchmarks/dpo.py, and the second time counts: a process's first minute is slow.
    """
    from benchmarks.dpo import COMMON, Bench
    from benchmarks.resolution import prepare_again

    limit_memory(case.cap)
    ours = ("model.weights=pretrained", f"model.id={weights}", "adapter=lora", f"trainer.cache={folder / 'cache'}")
    count = len(read_rows(case, folder))
    bench = Bench(argparse.Namespace(model=case.model, target=case.target, rows=count), (*COMMON, *ours))
    bench.again = False
    config = bench.config(
        "trainer.engine=shared", "trainer.gradient_checkpointing=false", "trainer.per_device_train_batch_size=1",
        f"trainer.gradient_accumulation_steps={PAIRS}", f"trainer.memory_budget={case.cap or 'auto'}",
    )  # fmt: skip
    config.adapter.target = MODULES[case.target]
    steps = max(steps, ENGINE_STEPS)
    trainer = bench.trainer(config, steps, warm=steps // 2)  # by then most CUDA graphs are captured
    trained = count_trained(trainer.model)
    once = 0.0 if trainer.live else prepare_again(bench, trainer, config, folder / "again") / count
    trainer.train()
    first = first_loss(trainer)
    found = bench.measure(trainer)
    return {**found, "micro": trainer.micro_batch, "trained": trained, "once": once, "first loss": first}


def limit_memory(cap: str | None) -> None:
    """Let this process have no more of its GPU; before anything is loaded, so that Unsloth plans with it."""
    if cap is None:
        return
    import torch

    from benchmarks.setting import GIB

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(float(cap.removesuffix("GiB")) * GIB / total)


def count_trained(model: Any) -> int:
    """Parameters with a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def first_loss(trainer: Any) -> float:
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def read_rows(case: Case, folder: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "datasets" / case.part))


def versions() -> dict[str, str]:
    """Of those PACKAGES that are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


PARTS = {"unsloth": unsloth, "trl": trl, "liger": liger, "engine": engine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case")
    parser.add_argument("--weights", type=Path, required=True, help="a folder with the base model and its processor")
    parser.add_argument("--folder", type=Path, required=True, help="with rows.parquet; what is written goes there too")
    parser.add_argument("--steps", type=int, default=3)
    asked = parser.parse_args()
    case = Case.named(asked.case)
    try:
        found = PARTS[case.part](case, asked.weights, asked.folder, asked.steps)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        found = {"error": "out of memory"}
    print(json.dumps({"case": asked.case, **found, "versions": versions()}), flush=True)


if __name__ == "__main__":
    main()
