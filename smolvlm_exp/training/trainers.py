"""The trainers: TRL's own, on the engine or stock, with complete checkpoints, counters that continue, finite steps.

A checkpoint holds safetensors and JSON only, so that reading one runs no code, and no training arguments, which hold
tokens in clear text. transformers writes it into a staging folder, which is renamed at the end; see runs/checkpoint.py.
"""

import logging
import random
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer
from trl import DPOTrainer, SFTTrainer

from smolvlm_exp.engine.inputs.micro_batches import step_rows
from smolvlm_exp.engine.trainers import SharedPrefixDPOTrainer, SharedPrefixSFTTrainer
from smolvlm_exp.runs.checkpoint import (
    SAVING,
    checkpoint_folders,
    damage,
    disk_error_as_run_error,
    finalise,
    prune_checkpoints,
    step_of,
)
from smolvlm_exp.runs.resume_check import IDENTITY
from smolvlm_exp.training.callbacks import EvaluationStopped, ProgressBar
from smolvlm_exp.training.nan_guard import NanGuard
from smolvlm_exp.training.state_files import load_state, save_state
from smolvlm_exp.utils.distributed import all_ranks, full_tensor
from smolvlm_exp.utils.errors import RunError
from smolvlm_exp.utils.files import write_json, write_text
from smolvlm_exp.utils.phases import phase

log = logging.getLogger(__name__)

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class CheckpointMixin(Trainer):
    """Comes first among a trainer's bases."""

    _metrics: Any  # TRL's
    _total_train_tokens: Any

    def __init__(
        self, model: Any, *, identity: dict[str, Any], not_finite_limit: int, card: str = "", **kwargs: Any
    ) -> None:
        """`identity` goes into every checkpoint (see resume_check.py), and `card` as its README.md."""
        # transformers would wait for every loss, and hide those that are not finite
        kwargs["args"].logging_nan_inf_filter = False
        super().__init__(model, **kwargs)
        self.identity, self.card = identity, card
        self.resumed_at = 0  # the step that training began at
        self.resumed_from: str | None = None  # the checkpoint
        self.damaged: set[int] = set()  # steps of checkpoints that were not resumed from, though newer
        self.saving: Path | None = None
        self.step_loss: Any = 0.0
        self.guard = NanGuard(not_finite_limit, self.rows_of)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if sys.stderr.isatty():
            self.add_callback(ProgressBar)
        if not self.args.bf16:
            # TRL casts adapters on quantized weights to bfloat16, which a model that computes in float32 cannot use
            for parameter in self.model.parameters():  # type: ignore[union-attr]
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    # Random numbers: a resumed run makes its loaders again, so they must not draw from the run's own random state

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        loader.generator = torch.Generator()
        if hasattr(loader, "base_dataloader"):  # under accelerate's wrapper
            loader.base_dataloader.generator = torch.Generator()
        return loader

    @phase("evaluation_during")
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    # Steps

    @phase("training")
    def train(self, *args: Any, **kwargs: Any) -> Any:
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = self.step_loss + loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last call before `optimizer.step()`, which skips its update where the norm or the loss is not finite."""
        norm = full_tensor(super()._get_grad_norm(model, grad_norm))
        finite = torch.isfinite(torch.as_tensor(norm, device=self.args.device) + self.step_loss)
        if self.accelerator.scaler and self.accelerator.scaler.get_scale() > 1:  # else it leaves this step out itself
            finite = torch.isfinite(torch.as_tensor(self.step_loss))
        finite = self.accelerator.gather(finite[None]).all()  # a loss may differ between processes
        self.step_loss = 0.0
        self.guard.mask_update(self.state.global_step + 1, finite, model, self.optimizer)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.guard.poll(wait=True)
        if "loss" in logs:
            self._tr_loss.zero_()  # transformers subtracts it from itself, which leaves what is not finite as it is
        super().log(logs, start_time)

    def rows_of(self, step: int) -> list[int]:
        """The row numbers of an optimiser step, in this process; steps count from 1."""
        loader = self.callback_handler.train_dataloader
        (rows,) = step_rows(loader, self.args.gradient_accumulation_steps, [step])
        return rows

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """A signal ends an evaluation too; the checkpoint then says that it is due (TrainerControl)."""
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.control.should_training_stop = True
            self.save_now()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing after the last step: a run that was killed right after it would take one more."""
        if self.resumed_from and self.state.global_step == self.resumed_at:
            self._load_rng_state(self.resumed_from)  # an evaluation that is due may be the one to stop after
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """When to log, evaluate and save is this command's; upstream goes on as the checkpoint says."""
        trained: tuple[int, int] = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return trained

    # Saving

    def save_now(self) -> None:
        """A checkpoint of the step that training is at, if there is no intact one yet."""
        if damage(Path(super()._get_output_dir(None)) / f"checkpoint-{self.state.global_step}"):
            self._save_checkpoint(cast(nn.Module, self.model), None)

    @phase("saving")
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.guard.poll(wait=True)
        if not self.finite_weights():
            log.warning(f"step {self.state.global_step}: weights are not finite, so no checkpoint is saved")
            return
        folder = Path(super()._get_output_dir(trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        staging = folder / SAVING / final.name
        try:
            with disk_error_as_run_error(folder.parent):
                if self.args.should_save:
                    shutil.rmtree(folder / SAVING, ignore_errors=True)  # of an interrupted save
                    staging.mkdir(parents=True)
                self.accelerator.wait_for_everyone()
                self.saving = staging.parent
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    best = self.best_checkpoint(final.parent)
                    if best and (best == final or best.is_dir()):
                        self.state.best_model_checkpoint = str(best)
                        self.state.save_to_json(str(staging / "trainer_state.json"))
                    write_json(staging / IDENTITY, self.identity)
                    finalise(staging, final)
                    self.damaged.discard(self.state.global_step)
                    best_saved = self.state.best_model_checkpoint
                    prune_checkpoints(final, self.args.save_total_limit, best_saved, self.damaged)
                self.accelerator.wait_for_everyone()
        finally:
            self.saving = None
            if self.args.should_save:
                shutil.rmtree(folder / SAVING, ignore_errors=True)

    def finite_weights(self) -> bool:
        """Whether what is trained can be used; of sharded weights nobody asks."""
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)  # type: ignore[union-attr]
        return self.sharded or all_ranks(all(bool(torch.isfinite(parameter).all()) for parameter in trained))

    def best_checkpoint(self, folder: Path) -> Path | None:
        """Of the best evaluation so far, which may not have been saved."""
        step = self.state.best_global_step
        return folder / f"checkpoint-{step}" if step else None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saving) if self.saving else super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainable weights, and no training_args.bin: it is a pickle, and holds tokens in clear text."""
        model: Any = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(output_dir, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save:  # PEFT has written a template with blanks, and where the base lies on this machine
            write_text(Path(str(output_dir)) / "README.md", self.card)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None in checkpoints: TRL writes its own outside the staging folder."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_state(Path(output_dir) / "optimizer.safetensors", self.optimizer.state_dict())  # type: ignore[union-attr]
            save_state(Path(output_dir) / "scheduler.safetensors", self.lr_scheduler.state_dict())  # type: ignore[union-attr]

    def _save_rng_state(self, output_dir: str) -> None:
        """Random states, and running sums of transformers, TRL and the engine since the last log, per process."""
        device = self.args.device
        random_states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        counters = {
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "tokens": getattr(self, "_total_train_tokens", 0),
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "shares": list(getattr(self, "shares", {}).get("train", [])),
            "left_out": self.guard.skipped,
            "loss_scale": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            **self.sampling_state(),
        }
        save_state(self.process_file(output_dir), {"random": random_states, "counters": counters})

    def _save_scaler(self, output_dir: str) -> None:
        """Not as a pickle: `_save_rng_state` has the loss scale."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """`_load_rng_state` does."""

    # Resuming

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Raises:
        RunError: a file has changed meanwhile, there is a pickle, or the weights are not this model's (what
            `resume_allow` let through).
        """
        pickle = next((p.name for p in Path(resume_from_checkpoint).rglob("*") if p.suffix in PICKLES), None)
        if pickle and not self.sharded:
            raise RunError(f"{resume_from_checkpoint} holds {pickle}; pickles are never read, and never written here.")
        adapters = getattr(self.model, "peft_config", {})
        folders = (path.name for path in Path(resume_from_checkpoint).iterdir() if path.is_dir())
        other = next((name for name in folders if name not in adapters), None)
        if other and not self.sharded:  # upstream would add it as an adapter, with whatever fields it has
            raise RunError(f"{resume_from_checkpoint} holds {other}/, which is no adapter of this model.")
        if problem := damage(Path(resume_from_checkpoint)):  # rows and model took a while
            raise RunError(f"{resume_from_checkpoint} has changed since it was verified: {problem}. Resume again.")
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(
                f"{resume_from_checkpoint} does not fit this model: {str(error).splitlines()[0]}\n"
                "Resume with the adapter and model that the run had; resume_allow cannot change that."
            ) from error

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """With the best checkpoint as its name is here: the run may have been moved since it was saved."""
        if self.resumed_from and self.state.global_step == self.resumed_at:  # no step was left
            self._load_rng_state(self.resumed_from)
        self.state.best_model_checkpoint = None
        if self.args.load_best_model_at_end:
            best = self.best_checkpoint(Path(super()._get_output_dir(None)))
            problem = f"no evaluation gave a number as eval_{self.args.metric_for_best_model}"
            if best:
                harm = damage(best)
                harm = harm and (f"is damaged: {harm}" if best.is_dir() else "is gone")
                problem = harm and f"{best.name}, the best checkpoint, {harm}"
            if problem:
                log.warning(f"load_best_model_at_end: {problem}; the last weights stay")
            else:
                self.state.best_model_checkpoint = str(best)
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        metric, value = self.args.metric_for_best_model, self.state.best_metric
        log.info(f"best checkpoint: step {self.state.best_global_step}, eval_{metric} {value:.4f}; it is the result")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.resumed_at, self.resumed_from = self.state.global_step, checkpoint
        others = map(step_of, checkpoint_folders(Path(checkpoint).parents[1]))
        self.damaged = {step for step in others if step > self.resumed_at}
        self.optimizer.load_state_dict(load_state(Path(checkpoint) / "optimizer.safetensors"))  # type: ignore[union-attr]
        self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / "scheduler.safetensors"))  # type: ignore[union-attr]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called right before the first step, or where there is none left."""
        if checkpoint is None:
            return
        path = self.process_file(checkpoint)
        if not path.is_file():  # made by fewer processes; see resume_check.py
            path = path.with_name("process-0.safetensors")
        saved, device = load_state(path), self.args.device
        states, counters = saved["random"], saved["counters"]
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        if device.type == "cuda" and states["cuda"] is not None:
            torch.cuda.set_rng_state(states["cuda"], device)
        self._tr_loss = counters["loss"].to(device)
        self._total_loss_scalar = counters["total_loss"]
        self._globalstep_last_logged = counters["last_logged"]
        self._total_train_tokens = on_device(counters["tokens"], device)
        self._metrics["train"].clear()
        for name, values in counters["metrics"].items():
            self._metrics["train"][name] += [on_device(value, device) for value in values]
        if hasattr(self, "shares"):
            self.shares["train"][:] = counters["shares"]
        self.guard.skipped = counters["left_out"]
        if self.accelerator.scaler and counters.get("loss_scale"):
            self.accelerator.scaler.load_state_dict(counters["loss_scale"])
        self.load_sampling_state(counters)
        callbacks: Any = self.state.stateful_callbacks
        due = callbacks["TrainerControl"]["args"]
        if due["should_evaluate"]:  # a signal ended this evaluation
            due["should_evaluate"] = False
            self._determine_best_metric(self._evaluate(None, None), None)

    def sampling_state(self) -> dict[str, Any]:
        """Further counters, of a trainer that samples answers; see grpo_trainers.py."""
        return {}

    def load_sampling_state(self, counters: dict[str, Any]) -> None:
        """Nothing, but for a trainer that samples answers."""

    @property
    def sharded(self) -> bool:
        """Whether another library writes the optimizer's state, in parts."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def process_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"process-{self.args.process_index}.safetensors"


def on_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


class EngineDPOTrainer(CheckpointMixin, SharedPrefixDPOTrainer):
    """trainer.engine=shared"""


class StockDPOTrainer(CheckpointMixin, DPOTrainer):
    """trainer.engine=stock"""


class EngineSFTTrainer(CheckpointMixin, SharedPrefixSFTTrainer):
    """trainer.engine=shared"""


class StockSFTTrainer(CheckpointMixin, SFTTrainer):
    """trainer.engine=stock"""
