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
from smolvlm_exp.engine.memory.roofline import CPU, CPU_REACHED, TRAINER, Card, seconds
from smolvlm_exp.models.shape import shape_from
from smolvlm_exp.tasks.workload import EVALUATION, run_seconds, spec_of_config, workload
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
    trainer, rows, held_out = config.trainer, len(preferences.train), len(preferences.test)
    train, test = ([list(map(int, row)) for row in part] for part in sizes)
    known = "truth" in preferences.test.column_names
    work = workload(trainer, train, rows, test, held_out, known, config.task.max_new_tokens)
    micro, level = trainer.per_device_train_batch_size, "full" if trainer.gradient_checkpointing else "none"
    pair = 0.0
    if rows:
        load = RowSizes(work.trained, work.pairs).average(micro)
        pair = TRAINER * seconds(spec, load, (level, level), card, trainer.gradient_accumulation_steps) / micro
    parts = run_seconds(trainer, spec, work, card, pair, tuned=rows > 0 or bool(config.model.adapter))
    evaluation = parts.pop(EVALUATION, 0.0)
    return CpuTime(sum(parts.values()), evaluation)
