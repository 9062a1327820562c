"""Finished runs grouped by their settings without the seed, and which of their differences are more than noise.

Runs that evaluated the same held-out rows are compared row by row, by the rows.safetensors in their folders.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from smolvlm_exp.evaluation.metrics import GOALS, deciding_metric, in_order, summary_value
from smolvlm_exp.evaluation.statistics import Ratio, changes, t_interval
from smolvlm_exp.evaluation.verdict import rows_changed
from smolvlm_exp.utils.files import atomic_file

FILE = "rows.safetensors"


@dataclass(frozen=True)
class PerRowResults:
    """A run's training and held-out rows, and each held-out row's part in each metric."""

    train: np.ndarray  # (rows,) uint64, of each row's question and images
    test: np.ndarray
    ratios: dict[str, Ratio]  # of the tuned model


def save_per_row(folder: Path, fingerprints: Mapping[str, Sequence[bytes]], ratios: Mapping[str, Ratio]) -> None:
    """
    Args:
        fingerprints: Preferences.prints.
        ratios: of the tuned model on the held-out rows.
    """
    arrays = {split: short_fingerprints(rows) for split, rows in fingerprints.items()}
    for name, ratio in ratios.items():
        arrays[f"metric {name}"] = np.stack([ratio.top, ratio.bottom, np.full(len(ratio.top), ratio.empty)])
    with atomic_file(folder / FILE) as part:  # `compare` may read the folder meanwhile
        save_file(arrays, part)


def load_per_row(folder: Path) -> PerRowResults | None:
    """None where the file is missing or damaged."""
    if not (folder / FILE).is_file():  # a pipe would be read without end
        return None
    try:
        arrays = load_file(folder / FILE)
        stored = {name.partition(" ")[2]: array for name, array in arrays.items() if name.startswith("metric ")}
        ratios = {name: Ratio(top, bottom, float(empty[0])) for name, (top, bottom, empty) in stored.items()}
        return PerRowResults(arrays["train"], arrays["test"], ratios)
    except (OSError, ValueError, KeyError, IndexError, SafetensorError):
        return None


def short_fingerprints(fingerprints: Sequence[bytes]) -> np.ndarray:
    """Eight bytes of each: two of a million rows are alike by chance once in 40 million times."""
    return np.frombuffer(b"".join(row[:8] for row in fingerprints), dtype=np.uint64)


@dataclass(frozen=True)
class Run:
    folder: Path
    settings: dict[str, str]  # the resolved configuration, flat, as text
    summary: dict[str, Any]
    rows: PerRowResults | None = None

    def value(self, path: str) -> float | None:
        return summary_value(self.summary, path)


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    settings: dict[str, str]  # those that differ between groups
    runs: list[Run]

    def seeds(self, path: str) -> list[float]:
        """One value per seed: a run that is named twice counts once."""
        values = {run.summary.get("seed"): value for run in self.runs if (value := run.value(path)) is not None}
        return list(values.values())

    def value(self, path: str) -> float | None:
        values = self.seeds(path)
        return mean(values) if values else None

    def seed_error(self, path: str) -> float:
        """Over seeds: half of Student's t interval; 0 for a single run, where it is unknown."""
        return t_interval(self.seeds(path)) or 0.0

    def error(self, path: str) -> float | None:
        """Half of the 95 % interval, over seeds and held-out rows together; None where neither is known."""
        part, _, key = path.partition(".")
        ends = [run.summary.get("intervals", {}).get(part, {}).get(key) for run in self.runs]
        over_rows = [(high - low) / 2 for low, high in filter(None, ends)]  # as each run measured it
        if not over_rows and len(self.seeds(path)) < 2:
            return None
        return math.hypot(mean(over_rows) if over_rows else 0.0, self.seed_error(path))

    def ratio(self, path: str) -> Ratio | None:
        """Each held-out row's part in a metric, averaged over the runs, where all evaluated the same rows."""
        rows = [run.rows for run in self.runs if run.rows is not None]
        ratios = [run.ratios.get(path.partition(".")[2]) for run in rows if path.startswith("after.")]
        known = [ratio for ratio in ratios if ratio is not None]
        if len(known) < len(self.runs) or not all(np.array_equal(run.test, rows[0].test) for run in rows):
            return None
        top, bottom = (np.mean([getattr(ratio, part) for ratio in known], axis=0) for part in ("top", "bottom"))
        return Ratio(top, bottom, known[0].empty)


@dataclass(frozen=True)
class Gap:
    """A group's difference to the best."""

    difference: float  # its metric less the best's
    noise: float | None  # half of the difference's 95 % interval; None where it is not known


@dataclass(frozen=True)
class Comparison:
    groups: list[Group]  # the best first
    gaps: list[Gap]  # of the groups
    keys: list[str]  # the settings that differ, seed apart
    metric: str

    @property
    def metrics(self) -> list[str]:
        """The metrics that all evaluations have, the deciding one first."""
        evaluated = [run.summary.get("after") or {} for group in self.groups for run in group.runs]
        paths = [f"after.{name}" for name in in_order({name: None for metrics in evaluated for name in metrics})]
        shared = [path for path in paths if all(group.value(path) is not None for group in self.groups)]
        return list(dict.fromkeys([self.metric, *shared]))

    @property
    def rows_changed(self) -> str:
        return rows_changed((run.summary for group in self.groups for run in group.runs), self.keys)

    def gap(self, group: Group) -> Gap:
        return self.gaps[self.groups.index(group)]

    def verdict(self, group: Group) -> str:
        """A group against the best."""
        if group.value(self.metric) is None:
            return "not measured"
        if group is self.groups[0]:
            return "best"
        gap = self.gap(group)
        if gap.noise is None:
            return "no confidence interval"
        return "worse" if abs(gap.difference) > gap.noise else "within the noise"


def measure_gap(best: Group, group: Group, metric: str) -> Gap:
    """Row by row where both evaluated the same held-out rows, else from the two intervals."""
    difference = (group.value(metric) or 0.0) - (best.value(metric) or 0.0)
    ours, theirs = group.ratio(metric), best.ratio(metric)
    rows = [g.runs[0].rows for g in (group, best)]
    if ours and theirs and rows[0] and rows[1] and np.array_equal(rows[0].test, rows[1].test):
        change = changes({"": theirs}, {"": ours})[""]
        over_rows = ((change.high - change.low) / 2) ** 2
        return Gap(difference, (over_rows + best.seed_error(metric) ** 2 + group.seed_error(metric) ** 2) ** 0.5)
    errors = best.error(metric), group.error(metric)
    return Gap(difference, None if None in errors else math.hypot(*(error or 0.0 for error in errors)))


def compare_runs(runs: Sequence[Run], asked: str | None) -> Comparison:
    """Group the runs by their settings without the seed, the best first; `asked`: config.metric."""
    metric = deciding_metric(asked, [run.summary for run in runs])
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = [key for key in keys if len({run.settings.get(key, "") for run in runs}) > 1]
    grouped: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        grouped.setdefault(tuple(run.settings.get(key, "") for key in differing), []).append(run)
    groups = [Group(dict(zip(differing, values, strict=True)), members) for values, members in grouped.items()]
    groups.sort(key=lambda g: math.inf if (value := g.value(metric)) is None else -GOALS[metric] * value)
    gaps = [measure_gap(groups[0], group, metric) for group in groups]
    return Comparison(groups, gaps, differing, metric)
