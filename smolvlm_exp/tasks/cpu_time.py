"""On a CPU: about how long a run is going to take, before it begins, and which settings take less."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.preferences import Preferences
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.memory.footprint import MemorySpec, RowSizes
from smolvlm_exp.engine.memory.roofline import CPU, CPU_REACHED, PRODUCTS, Card, frozen, seconds
from smolvlm_exp.evaluation.held_out import SAMPLES
from smolvlm_exp.evaluation.image_reliance import ABLATED_ROWS
from smolvlm_exp.models.shape import shape_from
from smolvlm_exp.tasks.plan import group_sizes, spec_of_config
from smolvlm_exp.utils.formatting import duration

log = logging.getLogger(__name__)

LONG = 600.0  # seconds; a run that takes less says nothing
SAMPLE = 256  # rows whose lengths stand for all


@dataclass(frozen=True)
class CpuTime:
    """Predicted seconds, from counted operations."""

    training: float  # with the reference's log-probabilities and the images' features; 0 without rows to train on
    evaluation: float  # before and after training; of the base and the tuned model

    @property
    def total(self) -> float:
        return self.training + self.evaluation


def log_cpu_time(config: Config, model: Any, preferences: Preferences, processor: Any) -> None:
    """Say how long the run will take, where that is long; nothing on a GPU."""
    if model.device.type != "cpu":
        return
    shape = shape_from(model.config)
    spec = spec_of_config(replace(config, model=replace(config.model, shape=shape)))
    sizes = [row_sizes(rows, processor) for rows in (preferences.train, preferences.test)]
    trains = len(preferences.train) > 0
    if predict(config, spec, CPU, preferences, sizes).total < LONG / 10:  # not worth a measurement
        return
    card = replace(CPU, matmul=CPU_REACHED * measure_matmul(model.dtype))
    now = predict(config, spec, card, preferences, sizes)
    if now.total < LONG:
        return
    settings = "fewer rows (data.train, data.test), trainer.max_steps" if trains else "fewer rows (data.test)"
    tiles = max(rows[:, 3].mean() for rows in sizes if len(rows))
    if tiles > 1:
        one_tile = predict(config, spec, card, preferences, [as_one_tile(rows, shape.image_seq_len) for rows in sizes])
        settings = (
            f"model.longest_edge={shape.image_size} (one tile per image, not {tiles:.0f}: about "
            f"{duration(one_tile.total)}), {settings}"
        )
    parts = f": training {duration(now.training)}, evaluation before and after {duration(now.evaluation)}"
    log.warning(f"cpu: this will take about {duration(now.total)}{parts if trains else ''}. To take less: {settings}")


def measure_matmul(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this CPU, with what else runs on it now."""
    left = torch.ones(1024, 1024, dtype=dtype)
    left @ left  # starts the threads
    began = time.perf_counter()
    for _ in range(8):
        left @ left
    return 8 * 2 * 1024**3 / (time.perf_counter() - began)


def row_sizes(rows: Any, processor: Any) -> np.ndarray:
    """`PackedDataset.sizes` of the first rows."""
    count = range(min(len(rows), SAMPLE))
    if not count:
        return np.empty((0, 4), dtype=int)
    return PackedDataset(rows.select(count), processor).sizes(count)


def as_one_tile(sizes: np.ndarray, image_seq_len: int) -> np.ndarray:
    """Rows' sizes if each had one tile at most."""
    changed = sizes.copy()
    changed[:, 3] = np.minimum(sizes[:, 3], 1)
    changed[:, 0] -= (sizes[:, 3] - changed[:, 3]) * image_seq_len
    return changed


def predict(
    config: Config, spec: MemorySpec, card: Card, preferences: Preferences, sizes: Sequence[np.ndarray]
) -> CpuTime:
    """
    Args:
        sizes: of training and of held-out rows; see `row_sizes`.
    """
    trainer, held_out, known = config.trainer, len(preferences.test), "truth" in preferences.test.column_names
    micro, batch = trainer.per_device_train_batch_size, trainer.per_device_eval_batch_size
    tested, level = RowSizes(sizes[1].tolist()), "full" if trainer.gradient_checkpointing else "none"
    token_flops = 2 * (spec.text.layers * sum(spec.text.matrices) + spec.vocabulary * spec.text.hidden)
    token = token_flops / (PRODUCTS * card.matmul)  # seconds of one more token of an answer

    changed, answered = min(ABLATED_ROWS, held_out), held_out if known else min(SAMPLES, held_out)
    passes, trains = held_out + 2 * changed + answered, len(preferences.train) > 0
    evaluation = passes * forward(spec, tested, batch, card) + answered * config.task.max_new_tokens * token
    evaluation *= 2 if trains or config.model.adapter else 1
    if spec.features:  # each image goes through the vision tower once
        evaluation += (held_out + changed) * images(spec, tested, batch, card)
    if not trains:
        return CpuTime(0.0, evaluation)

    trained = RowSizes([group_sizes(row, trainer) for row in sizes[0].tolist()], pairs=trainer.algorithm != "sft")
    read: float = trainer.num_train_epochs * len(preferences.train)
    if trainer.max_steps > 0:
        read = trainer.max_steps * trainer.pairs_per_step / trainer.group_size
    prepared = min(read, len(preferences.train))
    training = read * seconds(spec, trained.average(micro), (level, level), card) / micro
    training += prepared * forward(spec, trained, batch, card)
    if spec.features:
        training += prepared * images(spec, trained, batch, card)
    if trainer.samples_answers:
        training += read * trained.average(1).answers * token
    return CpuTime(training, evaluation)


def forward(spec: MemorySpec, rows: RowSizes, batch: int, card: Card) -> float:
    """Of a row in a pass over so many without gradients."""
    return seconds(frozen(spec), rows.average(batch), ("none", "none"), card) / batch


def images(spec: MemorySpec, rows: RowSizes, batch: int, card: Card) -> float:
    """Of a row's images in the vision tower."""
    with_tower, without = (forward(replace(spec, features=kept), rows, batch, card) for kept in (False, True))
    return with_tower - without
