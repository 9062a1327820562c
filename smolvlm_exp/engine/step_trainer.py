"""A whole optimiser step at a time, in micro-batches as large as memory allows, whatever transformers' batches are.

transformers calls `training_step` for each of `gradient_accumulation_steps` batches. All but the last of these calls
have nothing to do: the last one runs the whole step. Out of memory, it retries the step in smaller micro-batches; and
where gradients exceed float16, with half the loss scale.
"""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from smolvlm_exp.engine.forward import add_packed_forward
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.micro_batches import step_rows
from smolvlm_exp.engine.inputs.tiles import pixels
from smolvlm_exp.engine.layers.fuse import free_graphs
from smolvlm_exp.engine.memory.probe import out_of_memory
from smolvlm_exp.engine.model_parts import base_of, core_of
from smolvlm_exp.utils.distributed import all_reduce_mean, gather

log = logging.getLogger(__name__)

FIRST_SCALE = 2.0**16  # of losses in float16, PyTorch's own
NO_WORKERS = {
    "dataloader_num_workers": 0, "dataloader_persistent_workers": False, "dataloader_prefetch_factor": None,
}  # fmt: skip


@contextlib.contextmanager
def overridden(target: Any, **values: Any) -> Iterator[None]:
    """Attributes of `target` set for a while."""
    before = {name: getattr(target, name) for name in values}
    try:
        vars(target).update(values)
        yield
    finally:
        vars(target).update(before)


class StepTrainer(Trainer):
    """Comes before one of TRL's trainers among a class's bases.

    Attributes:
        counted: what micro-batches are made of.
        micro_batch: so many of them in one forward and backward pass; eval_micro_batch: in one of evaluation.
        batch_loss: the loss is not a mean over them, so those of one of transformers' batches stay together.
        running: what is in the pass that runs now.
        planned: how many of them a row may be for the memory planner, which counts rows; the first that fits.
    """

    counted = "pairs"
    batch_loss = False
    running: Sequence[Any] = ()
    planned: Sequence[int] = (1,)
    _metrics: dict[str, defaultdict[Any, list[Any]]]  # TRL's
    maybe_activation_offload_context: Any = contextlib.nullcontext()
    _signature_columns: Any

    def __init__(self, model: Any, *, rows: PackedDataset, eval_rows: PackedDataset | None, **trl: Any) -> None:
        """Args:
        model: as trainers.py's `attach_and_fuse` leaves it.
        rows: of training; eval_rows: held out.
        trl: the TRL trainer's own arguments.
        """
        args = trl["args"]
        self.rows, self.eval_rows = rows, eval_rows
        self.micro_batch = args.per_device_train_batch_size
        self.eval_micro_batch = args.per_device_eval_batch_size
        self.out_of_memory = 0  # how often, for summary.json
        self.loader: Any = None
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every row has an image, so every parameter is used
        weights = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(
            model=model,
            train_dataset=index_dataset(len(rows)),
            eval_dataset=index_dataset(len(eval_rows)) if eval_rows is not None else None,
            **trl,
        )
        for parameter, data in weights:  # TRL rounds adapters on quantised weights to bfloat16
            parameter.data = data.to(parameter.device)
        if self.is_fsdp_enabled:  # accelerate would have trained parameters rounded to bfloat16 in every forward pass
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.pixels = pixels(trl["processing_class"])
        add_packed_forward(base_of(model), self.pixels, self.statistics())

    def statistics(self) -> tuple[str, ...]:
        """Those of forward.py's `STATISTICS` that TRL's loss and metrics need."""
        raise NotImplementedError

    def step_of(self, inputs: Any) -> Any:
        """The whole step, when `inputs` are the last of its batches; else None."""
        raise NotImplementedError

    def run(self, model: nn.Module, step: Any, num_items_in_batch: Any) -> torch.Tensor:
        """Forward and backward passes of a step in micro-batches of at most `micro_batch`; its loss, detached."""
        raise NotImplementedError

    def row_sizes(self, rows: Sequence[int], counted: int) -> np.ndarray:
        """`PackedDataset.sizes` of training rows, with at most `counted` items each."""
        raise NotImplementedError

    def log_probs_of(self, rows: Sequence[int], counted: int) -> torch.Tensor:
        """Of a pass over rows of these sizes."""
        raise NotImplementedError

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["row"]

    def get_train_dataloader(self) -> Any:
        """Of row numbers only, so without workers; always the same, for `rows_ahead`'s sake."""
        if self.loader is None:
            with overridden(self.args, **NO_WORKERS):
                self.loader = super().get_train_dataloader()
        return self.loader

    def rows_ahead(self) -> list[int]:
        """The numbers of the rows that training will read, by all processes together, in ascending order."""
        _, steps = self.epochs_and_steps()
        mine: set[int] = set()
        loader, accumulate = self.get_train_dataloader(), self.args.gradient_accumulation_steps
        for rows in step_rows(loader, accumulate, range(1, steps + 1)):
            mine.update(rows)
            if len(mine) == len(self.rows):  # before the first of many epochs' end
                break
        return sorted(set().union(*gather(mine)))

    def epochs_and_steps(self) -> tuple[int, int]:
        """Of the training to come; of the last epoch perhaps a part."""
        epochs, *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return epochs, steps

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward passes of a whole optimiser step.

        Processes synchronise once per step, when each has its gradients, so each may run as many micro-batches as it
        needs. Not under FSDP: all processes gather sharded weights together, layer by layer.
        """
        step = self.step_of(inputs)
        if step is None:
            return torch.zeros((), device=self.args.device)
        own = model.module if isinstance(model, DistributedDataParallel) else model
        loss = self.optimizer_step(own, step, num_items_in_batch)
        if own is not model:
            trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            all_reduce_mean([parameter.grad for parameter in trained if parameter.grad is not None])
        return loss

    def optimizer_step(self, model: nn.Module, step: Any, num_items_in_batch: Any) -> torch.Tensor:
        """The step's loss in this process, detached; in smaller micro-batches where memory runs out.

        A step whose gradients exceed float16 is run again with half the loss scale, where PyTorch's own way is to leave
        it out, its rows with it (arXiv 1710.03740, section 3.2).
        """
        if not model.training:  # to go through some thousand modules takes as long as a small model's pass
            model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[union-attr]
        while True:
            before, self.running = self.snapshot(), ()
            try:
                with self.maybe_activation_offload_context:
                    loss = self.run(model, step, num_items_in_batch)
                if not self.exceeds_float16(model, loss):
                    return loss
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self.halve_micro_batch(error)
            # Here, because the error above holds the failed pass's tensors.
            model.zero_grad()
            self.restore(before)

    def exceeds_float16(self, model: nn.Module, loss: torch.Tensor) -> bool:
        """Whether gradients, in any process, may be finite with half the loss scale, which it now is."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return False
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        exceeds = torch.isfinite(loss) & ~torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()
        if not self.accelerator.gather(exceeds[None]).any():
            return False
        scale = scaler.get_scale()
        scaler.update(scale / 2 if scale > 1 else FIRST_SCALE)  # at 1 they are not finite in any case: see nan_guard.py
        return scale > 1

    # Memory

    def snapshot(self) -> Any:
        """What a step changes besides gradients: random states, TRL's metrics."""
        gpu = torch.cuda.get_rng_state() if self.args.device.type == "cuda" else None
        return torch.get_rng_state(), gpu, {name: list(values) for name, values in self._metrics["train"].items()}

    def restore(self, before: Any) -> None:
        rng, gpu, metrics = before
        torch.set_rng_state(rng)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
            free_graphs(core_of(self.model))
            torch.cuda.empty_cache()
        self._metrics["train"].clear()
        self._metrics["train"].update(metrics)

    def halve_micro_batch(self, error: Exception) -> None:
        """Smaller micro-batches from here on.

        Raises:
            RuntimeError: there are none, or other processes could not follow.
        """
        failed = len(self.running) or self.micro_batch  # before the first pass of the step
        unit = self.args.per_device_train_batch_size if self.batch_loss else 1
        smaller = max(failed // 2 // unit, failed > unit) * unit
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RuntimeError(
                f"Out of memory at micro-batch {failed}, which sharded weights cannot lower during a run.\n"
                "Lower trainer.memory_budget, so that smaller micro-batches are planned."
            ) from error
        if not smaller:
            if not self.running:
                raise error
            if failed > 1:
                raise RuntimeError(
                    f"Out of memory with {failed} {self.counted}, which this loss needs together.\n"
                    "Lower trainer.per_device_train_batch_size and raise trainer.gradient_accumulation_steps."
                ) from error
            raise RuntimeError(
                f"Out of memory with {self.describe(self.running)}.\n"
                "Try: trainer.gradient_checkpointing=true, quant=nf4, adapter.target=text, data.max_length, or a "
                "smaller model."
            ) from error
        self.micro_batch = smaller
        self.out_of_memory += 1
        log.warning(f"Out of memory at micro-batch {failed}: retrying this step and continuing with {smaller}")

    def describe(self, running: Sequence[Any]) -> str:
        """The only item of a micro-batch that is too large."""
        raise NotImplementedError

    # Metrics

    def average_metrics(self, mode: str) -> None:
        """TRL's metrics, over all processes, which may have counted different numbers of micro-batches."""
        if self.accelerator.num_processes == 1:
            return
        everyone = gather(dict(self._metrics[mode]))
        for name in self._metrics[mode]:
            self._metrics[mode][name] = [value for metrics in everyone for value in metrics[name]]


def index_dataset(rows: int) -> datasets.Dataset:
    """What transformers and TRL take for the data: row numbers, and a column that says there are images."""
    return datasets.Dataset.from_dict({"row": range(rows), "images": [[]] * rows})
