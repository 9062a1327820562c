"""Optimiser steps over packed micro-batches, whatever the size of the loader's batches.

transformers fetches `gradient_accumulation_steps` batches of `per_device_train_batch_size` row numbers, the very rows
stock TRL would train on. A step's gradient is that of the mean over all its pairs.

Where the loader's last batch of an epoch is not full, stock TRL gives its pairs more weight; here every pair counts
alike. `entropy`, `logits/*` and `mean_token_accuracy` are TRL's means over the tokens that its loss code sees at once,
so they follow the micro-batch; every other logged number is stock TRL's.
"""

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from smolvlm_exp.engine.deferred_metrics import DeferredMetrics, flush_metrics
from smolvlm_exp.engine.inputs.dataset import PackedDataset, batch_loader
from smolvlm_exp.engine.inputs.micro_batches import (
    Batch,
    MicroBatch,
    Step,
    StepSampler,
    concat_pairs,
    slice_pairs,
    split_micro_batches,
)
from smolvlm_exp.engine.layers.fuse import free_graphs, replaying, stack_of
from smolvlm_exp.engine.memory.probe import out_of_memory
from smolvlm_exp.engine.model_parts import core_of
from smolvlm_exp.engine.step_trainer import NO_WORKERS, StepTrainer, overridden
from smolvlm_exp.utils.distributed import no_gather

log = logging.getLogger(__name__)


class PackedTrainer(StepTrainer):
    """DPO's and SFT's; see StepTrainer.

    Attributes:
        shares: per mode, how much each call of TRL's loss code counts in its logged means.
        replays: whether CUDA graphs are planned; None: nothing is, and they are tried.
    """

    replays: bool | None = None
    _total_train_tokens: Any

    def __init__(self, model: Any, **kwargs: Any) -> None:
        """As StepTrainer."""
        self.shares: dict[str, list[float]] = defaultdict(list)
        self.source: Any = None
        super().__init__(
            model, data_collator=lambda examples: {"rows": [example["row"] for example in examples]}, **kwargs
        )
        self.sampler: Any = StepSampler(self.args.gradient_accumulation_steps, self.split)
        self.batches = self.make_loader()

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

    def loss_of(self, outputs: Any, fields: Batch, num_items_in_batch: Any) -> torch.Tensor:
        """TRL's loss of one segment; it adds to TRL's metrics."""
        raise NotImplementedError

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; then the workers end: torch 2.11 waits five seconds for each at exit."""
        self.rows.few_lengths = self.can_replay
        if stack := stack_of(core_of(self.model)):
            stack.warm = False
        try:
            return super().train(*args, **kwargs)
        finally:
            self.batches, self.batches_left = self.make_loader(), iter(())
            free_graphs(core_of(self.model))

    @property
    def can_replay(self) -> bool:
        """Whether the text model's passes can be, or are planned to be, CUDA graphs."""
        stack = stack_of(core_of(self.model))
        return self.replays is not False and stack is not None and stack.can_replay

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

    def step_of(self, inputs: Any) -> Step | None:
        step: Step | None = inputs.get("step")
        return step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As StepTrainer's, with the tokens of all processes counted."""
        tokens = self._total_train_tokens + 0  # a copy: TRL adds in place
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes > 1 and "step" in inputs:
            mine = torch.as_tensor(self._total_train_tokens - tokens, device=self.args.device)
            self._total_train_tokens = tokens + self.accelerator.reduce(mine)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def run(self, model: nn.Module, step: Step, num_items_in_batch: Any) -> torch.Tensor:
        with replaying(core_of(self.model), self.rows.few_lengths):
            return self.run_micro_batches(model, step, num_items_in_batch)

    def run_micro_batches(self, model: nn.Module, step: Step, num_items_in_batch: Any) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        if any(len(micro.rows) > self.micro_batch for micro in step.micros):  # prepared before micro_batch shrank
            step.micros, step.batches = self.split(step.units), []
        for i, micro in enumerate(step.micros):
            self.running = micro.rows
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

    def row_sizes(self, rows: Sequence[int], counted: int) -> np.ndarray:
        return self.rows.sizes(rows)

    def log_probs_of(self, rows: Sequence[int], counted: int) -> torch.Tensor:
        self.rows.few_lengths = self.can_replay
        _, outputs = self.score(self.model, self.rows.batch(rows))  # type: ignore[arg-type]
        log_probs: torch.Tensor = outputs.log_probs
        return log_probs

    def on_device(self, batch: Batch) -> Batch:
        """The tensors of a collated batch, without the row numbers."""
        tensors = {name: value for name, value in batch.items() if name != "rows"}
        return send_to_device(tensors, self.args.device, non_blocking=True)

    def reference_of(self, fields: Batch, packed: Batch) -> Batch:
        """What the loss needs of a reference and the rows do not have."""
        return {}

    def snapshot(self) -> Any:
        tokens = self._total_train_tokens + 0  # a copy: TRL adds in place
        return super().snapshot(), list(self.shares["train"]), tokens

    def restore(self, before: Any) -> None:
        rest, self.shares["train"], self._total_train_tokens = before
        super().restore(rest)

    def describe(self, running: Sequence[int]) -> str:
        (row,) = running
        (sizes,) = self.rows.sizes([row])
        return f"a single pair, row {row}: {sizes[:3].sum()} tokens, {sizes[3]} tiles"

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of `per_device_eval_batch_size`, collated by workers of its own where images are not ready."""
        assert self.eval_rows is not None
        workers = NO_WORKERS if self.eval_rows.precomputed else {}
        with overridden(self, data_collator=self.eval_rows.batch_of), overridden(self.args, **workers):
            return super().get_eval_dataloader(eval_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        free_graphs(core_of(self.model))
        return super().evaluate(*args, **kwargs)

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
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1:
                    raise
            self.eval_micro_batch = size // 2
            if self.args.device.type == "cuda":
                torch.cuda.empty_cache()
            log.warning(f"Out of memory evaluating {size} pairs at once: retrying and continuing with {size // 2}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"  # type: ignore[union-attr]
        flush_metrics(self._metrics[mode], self.shares[mode])
        self.average_metrics(mode)
        self.shares[mode].clear()
        super().log(logs, start_time)
