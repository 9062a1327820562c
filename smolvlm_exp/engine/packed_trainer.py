"""Optimiser steps over packed micro-batches, whatever the size of the loader's batches.

transformers fetches `gradient_accumulation_steps` batches of `per_device_train_batch_size` row numbers, the very rows
stock TRL would train on, and calls `training_step` for each. All but the last of these calls have nothing to do: the
last one runs the whole step, in micro-batches as large as memory allows, and gives it the gradient of the mean over all
its pairs. Out of memory, it retries the step in smaller ones.

Where the loader's last batch of an epoch is not full, stock TRL gives its pairs more weight; here every pair counts
alike. `entropy`, `logits/*` and `mean_token_accuracy` are TRL's means over the tokens that its loss code sees at once,
so they follow the micro-batch; every other logged number is stock TRL's.
"""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from smolvlm_exp.engine.deferred_metrics import DeferredMetrics, flush_metrics
from smolvlm_exp.engine.forward import add_packed_forward
from smolvlm_exp.engine.inputs.dataset import PackedDataset, batch_loader
from smolvlm_exp.engine.inputs.micro_batches import (
    Batch,
    MicroBatch,
    Step,
    StepSampler,
    concat_pairs,
    slice_pairs,
    split_micro_batches,
    step_rows,
)
from smolvlm_exp.engine.inputs.tiles import pixels
from smolvlm_exp.engine.memory.probe import out_of_memory
from smolvlm_exp.engine.model_parts import base_of
from smolvlm_exp.utils.distributed import all_reduce_mean, gather, no_gather

log = logging.getLogger(__name__)

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


class PackedTrainer(Trainer):
    """What turns one of TRL's trainers into the engine's; comes before it among a class's bases.

    Attributes:
        micro_batch: pairs in one forward and backward pass; eval_micro_batch: in one of evaluation.
        batch_loss: the loss is not a mean over pairs; see `split_micro_batches`.
        shares: per mode, how much each call of TRL's loss code counts in its logged means.
    """

    batch_loss = False
    _metrics: dict[str, defaultdict[Any, list[Any]]]  # TRL's
    _total_train_tokens: Any
    maybe_activation_offload_context: Any
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
        self.shares: dict[str, list[float]] = defaultdict(list)
        self.source: Any = None
        self.loader: Any = None
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every row has an image, so every parameter is used
        weights = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(
            model=model,
            data_collator=lambda examples: {"rows": [example["row"] for example in examples]},
            train_dataset=index_dataset(len(rows)),
            eval_dataset=index_dataset(len(eval_rows)) if eval_rows is not None else None,
            **trl,
        )
        for parameter, data in weights:  # TRL rounds adapters on quantised weights to bfloat16
            parameter.data = data.to(parameter.device)
        if self.is_fsdp_enabled:  # accelerate would have trained parameters rounded to bfloat16 in every forward pass
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.sampler: Any = StepSampler(args.gradient_accumulation_steps, self.split)
        self.batches = self.make_loader()
        self.pixels = pixels(trl["processing_class"])
        add_packed_forward(base_of(model), self.pixels, self.statistics())

    def make_loader(self) -> Any:
        """A loader of whole steps' micro-batches, whose workers live as long as it does."""
        return batch_loader(
            self.rows.batch,
            self.sampler,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_num_workers > 0,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def split(self, units: list[list[int]]) -> list[MicroBatch]:
        return split_micro_batches(units, self.micro_batch, self.batch_loss)

    def statistics(self) -> tuple[str, ...]:
        """Those of forward.py's `STATISTICS` that TRL's loss and metrics need."""
        raise NotImplementedError

    def loss_of(self, outputs: Any, fields: Batch, num_items_in_batch: Any) -> torch.Tensor:
        """TRL's loss of one segment; it adds to TRL's metrics."""
        raise NotImplementedError

    # Training

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["row"]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; then the workers end: torch 2.11 waits five seconds for each at exit."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.batches, self.batches_left = self.make_loader(), iter(())

    def get_train_dataloader(self) -> Any:
        """Of row numbers only, because `self.batches` has the workers; always the same, for `rows_ahead`'s sake."""
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

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """One call's worth of work, in as many parts as transformers counts."""
        if epoch_iterator is not self.source:
            self.source = self.sampler.source = epoch_iterator
            self.sampler.steps.clear()  # of an epoch that was left early
            self.batches_left = iter(self.batches)
        first = next(self.batches_left, None)
        if first is None:
            return [], None
        step = self.sampler.steps.popleft()
        step.batches = [first, *islice(self.batches_left, len(step.micros) - 1)]
        idle: list[Any] = [{} for _ in step.units[1:]]
        return [*idle, {"step": step}], self._get_num_items_in_batch(step.batches, device)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward passes of a whole optimiser step.

        Processes synchronise once per step, when each has its gradients, so each may run as many micro-batches as it
        needs. Not under FSDP: all processes gather sharded weights together, layer by layer.
        """
        if "step" not in inputs:
            return torch.zeros((), device=self.args.device)
        tokens = self._total_train_tokens + 0  # a copy: TRL adds in place
        own = model.module if isinstance(model, DistributedDataParallel) else model
        loss = self.optimizer_step(own, inputs["step"], num_items_in_batch)
        if own is not model:
            trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            all_reduce_mean([parameter.grad for parameter in trained if parameter.grad is not None])
        if self.accelerator.num_processes > 1:
            mine = torch.as_tensor(self._total_train_tokens - tokens, device=self.args.device)
            self._total_train_tokens = tokens + self.accelerator.reduce(mine)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def optimizer_step(self, model: nn.Module, step: Step, num_items_in_batch: Any) -> torch.Tensor:
        """The step's loss in this process, detached; in smaller micro-batches where memory runs out."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[union-attr]
        while True:
            before = self.snapshot()
            try:
                with self.maybe_activation_offload_context:
                    return self.run(model, step, num_items_in_batch)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self.halve_micro_batch(error)
            # Here, because the error above holds the failed pass's tensors.
            model.zero_grad()
            self.restore(before)

    def run(self, model: nn.Module, step: Step, num_items_in_batch: Any) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        if any(len(micro.rows) > self.micro_batch for micro in step.micros):  # prepared before micro_batch shrank
            step.micros, step.batches = self.split(step.units), []
        for i, micro in enumerate(step.micros):
            self.running = micro
            batch = step.batches[i] if step.batches else self.rows.batch(micro.rows)
            last = i == len(step.micros) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.micro_loss(model, batch, micro, step.pairs, num_items_in_batch)
                del batch
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def micro_loss(
        self, model: nn.Module, batch: Batch, micro: MicroBatch, pairs: int, num_items_in_batch: Any
    ) -> torch.Tensor:
        """A micro-batch's share of the step's loss."""
        fields, outputs = self.score(model, batch)
        loss: Any = 0.0
        start = 0
        for segment, share in zip(micro.segments, micro.shares, strict=True):
            part = slice(start, start := start + len(segment))
            weight = len(segment) / pairs if num_items_in_batch is None else 1.0  # TRL has divided by it already
            self.shares["train"].append(share)
            mine, answers = (slice_pairs(values, part, len(micro.rows)) for values in (fields, outputs))
            with DeferredMetrics(), no_gather(self.accelerator):
                loss += weight * self.loss_of(answers, mine, num_items_in_batch)
        return loss

    def score(self, model: nn.Module, batch: Batch) -> tuple[Batch, Any]:
        """A collated batch -> TRL's own fields, and the model's outputs in TRL's layout."""
        fields = self.on_device(batch)
        packed = fields.pop("packed")
        labels = fields.get("labels")  # of supervised fine-tuning
        if labels is None:
            labels = fields["input_ids"].masked_fill(fields["completion_mask"] == 0, -100)
        outputs = model(packed=packed, labels=labels)
        return {**fields, **self.reference_of(fields, packed)}, outputs

    def on_device(self, batch: Batch) -> Batch:
        """The tensors of a collated batch, without the row numbers."""
        tensors = {name: value for name, value in batch.items() if name != "rows"}
        return send_to_device(tensors, self.args.device, non_blocking=True)

    def reference_of(self, fields: Batch, packed: Batch) -> Batch:
        """What the loss needs of a reference and the rows do not have."""
        return {}

    # Memory

    def snapshot(self) -> Any:
        """What a step changes besides gradients: random states, TRL's metrics."""
        gpu = torch.cuda.get_rng_state() if self.args.device.type == "cuda" else None
        metrics = {name: list(values) for name, values in self._metrics["train"].items()}
        tokens = self._total_train_tokens + 0  # a copy: TRL adds in place
        return torch.get_rng_state(), gpu, metrics, list(self.shares["train"]), tokens

    def restore(self, before: Any) -> None:
        rng, gpu, metrics, self.shares["train"], self._total_train_tokens = before
        torch.set_rng_state(rng)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
            torch.cuda.empty_cache()
        self._metrics["train"].clear()
        self._metrics["train"].update(metrics)

    def halve_micro_batch(self, error: RuntimeError) -> None:
        """Smaller micro-batches from here on.

        Raises:
            RuntimeError: there are none, or other processes could not follow.
        """
        failed = len(self.running.rows)
        unit = self.args.per_device_train_batch_size if self.batch_loss else 1
        smaller = failed // 2 // unit * unit
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RuntimeError(
                f"Out of memory at micro-batch {failed}, which sharded weights cannot lower during a run.\n"
                "Lower trainer.memory_budget, so that smaller micro-batches are planned."
            ) from error
        if not smaller:
            if failed > 1:
                raise RuntimeError(
                    f"Out of memory with {failed} pairs, which this loss needs together.\n"
                    "Lower trainer.per_device_train_batch_size and raise trainer.gradient_accumulation_steps."
                ) from error
            (row,) = self.running.rows
            (sizes,) = self.rows.sizes([row])
            raise RuntimeError(
                f"Out of memory with a single pair, row {row}: {sizes[:3].sum()} tokens, {sizes[3]} tiles.\n"
                "Try: trainer.gradient_checkpointing=true, quant=nf4, adapter.target=text, data.max_length, or a "
                "smaller model."
            ) from error
        self.micro_batch = smaller
        self.out_of_memory += 1
        log.warning(f"Out of memory at micro-batch {failed}: retrying this step and continuing with {smaller}")

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of `per_device_eval_batch_size`, collated by workers of its own where images are not ready."""
        assert self.eval_rows is not None
        workers = NO_WORKERS if self.eval_rows.precomputed else {}
        with overridden(self, data_collator=self.eval_rows.batch_of), overridden(self.args, **workers):
            return super().get_eval_dataloader(eval_dataset)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """TRL's loss and metrics of one of the evaluation loader's batches."""
        assert self.eval_rows is not None
        with torch.no_grad(), self.compute_loss_context_manager():
            fields, outputs = self.in_parts(inputs, self.eval_rows, lambda batch: self.score(model, batch))
            self.shares["eval"].append(1.0)
            with DeferredMetrics():
                loss = self.loss_of(outputs, fields, None)
        return loss.detach(), None, None

    def in_parts(self, batch: Batch, rows: PackedDataset, run: Callable[[Batch], tuple[Any, ...]]) -> list[Any]:
        """`run`'s mappings of tensors for a batch, without gradients, computed in as many parts as memory needs.

        Training's micro-batch stays as it is.
        """
        numbers = batch["rows"].tolist()
        while True:
            size = min(self.eval_micro_batch, len(numbers))
            parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
            try:
                results = [run(batch if part == numbers else rows.batch(part)) for part in parts]
                return [concat_pairs(pieces, list(map(len, parts))) for pieces in zip(*results, strict=True)]
            except RuntimeError as error:
                if not out_of_memory(error) or size == 1:
                    raise
            self.eval_micro_batch = size // 2
            if self.args.device.type == "cuda":
                torch.cuda.empty_cache()
            log.warning(f"Out of memory evaluating {size} pairs at once: retrying and continuing with {size // 2}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        flush_metrics(self._metrics[mode], self.shares[mode])
        if self.accelerator.num_processes > 1:
            everyone = gather(dict(self._metrics[mode]))
            for name in self._metrics[mode]:
                columns = zip(*(metrics[name] for metrics in everyone), strict=True)
                self._metrics[mode][name] = [sum(column) / len(column) for column in columns]
        self.shares[mode].clear()
        super().log(logs, start_time)


def index_dataset(rows: int) -> datasets.Dataset:
    """What transformers and TRL take for the data: row numbers, and a column that says there are images."""
    return datasets.Dataset.from_dict({"row": range(rows), "images": [[]] * rows})
