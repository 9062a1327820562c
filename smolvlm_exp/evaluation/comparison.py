"""Finished runs as groups that differ in more than their seed, and what of their differences is more than luck."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from smolvlm_exp.evaluation.metrics import GOALS, METRICS, summary_value
from smolvlm_exp.evaluation.per_row import PerRowResults
from smolvlm_exp.evaluation.statistics import Ratio, changes, t_interval


@dataclass(frozen=True)
class Run:
    folder: Path
    settings: dict[str, str]  # the whole resolved configuration, flat, as text
    summary: dict[str, Any]
    rows: PerRowResults | None = None

    def value(self, path: str) -> float | None:
        return summary_value(self.summary, path)

    def half(self, path: str) -> float | None:
        """Half of the 95 % interval that the run measured over its own held-out rows."""
        ends = self.summary.get("intervals", {}).get("after", {}).get(path.partition(".")[2])
        return (ends[1] - ends[0]) / 2 if ends and path.startswith("after.") else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    settings: dict[str, str]  # what tells the group from the others
    runs: list[Run]

    def seeds(self, path: str) -> list[float]:
        """A value a seed: a run that is there twice is no second run."""
        found = {run.summary.get("seed"): value for run in self.runs if (value := run.value(path)) is not None}
        return list(found.values())

    def value(self, path: str) -> float | None:
        found = self.seeds(path)
        return mean(found) if found else None

    def luck(self, path: str) -> float:
        """What other seeds would change: half of Student's t interval; 0 for a single run, which cannot know."""
        return t_interval(self.seeds(path)) or 0.0

    def half(self, path: str) -> float | None:
        """What other held-out rows would change: half of the bootstrap's interval."""
        found = [half for run in self.runs if (half := run.half(path)) is not None]
        return mean(found) if found else None

    def error(self, path: str) -> float | None:
        """Half of the 95 % interval, over seeds and held-out rows together; None where neither is known."""
        half = self.half(path)
        return (
            None if half is None and len(self.seeds(path)) < 2 else ((half or 0.0) ** 2 + self.luck(path) ** 2) ** 0.5
        )

    def ratio(self, path: str) -> Ratio | None:
        """What each held-out row adds to a metric, averaged over the runs, where all looked at the same rows."""
        kept = [run.rows for run in self.runs if run.rows is not None]
        ratios = [each.ratios.get(path.partition(".")[2]) for each in kept if path.startswith("after.")]
        known = [ratio for ratio in ratios if ratio is not None]
        if len(known) < len(self.runs) or not all(np.array_equal(each.test, kept[0].test) for each in kept):
            return None
        top, bottom = (np.mean([getattr(ratio, part) for ratio in known], axis=0) for part in ("top", "bottom"))
        return Ratio(top, bottom, known[0].empty)


@dataclass(frozen=True)
class Gap:
    """How far a group is from the best."""

    difference: float  # its metric less the best's
    noise: float | None  # half of the difference's 95 % interval; None where it is not known
    paired: bool  # whether the two were compared row by row


@dataclass(frozen=True)
class Comparison:
    groups: list[Group]  # the best first
    keys: list[str]  # the settings that differ, seed apart
    metric: str

    @property
    def metrics(self) -> list[str]:
        """What all evaluations have in common, the one that decides first."""
        names = [f"after.{name}" for name in METRICS if all(g.value(f"after.{name}") is not None for g in self.groups)]
        return list(dict.fromkeys([self.metric, *names]))

    @cached_property
    def gaps(self) -> list[Gap]:
        """Of each group."""
        return [self.between(self.groups[0], group) for group in self.groups]

    def gap(self, group: Group) -> Gap:
        return self.gaps[self.groups.index(group)]

    def between(self, best: Group, group: Group) -> Gap:
        metric = self.metric
        difference = (group.value(metric) or 0.0) - (best.value(metric) or 0.0)
        luck = best.luck(metric) ** 2 + group.luck(metric) ** 2
        ours, theirs = group.ratio(metric), best.ratio(metric)
        if ours and theirs and np.array_equal(tests_of(group), tests_of(best)):
            change = changes({"": theirs}, {"": ours})[""]
            return Gap(difference, (((change.high - change.low) / 2) ** 2 + luck) ** 0.5, paired=True)
        errors = best.error(metric), group.error(metric)
        noise = None if None in errors else sum((error or 0.0) ** 2 for error in errors) ** 0.5
        return Gap(difference, noise, paired=False)

    def verdict(self, group: Group) -> str:
        """How a group stands to the best."""
        if group.value(self.metric) is None:
            return "not measured"
        if group is self.groups[0]:
            return "best"
        gap = self.gap(group)
        if gap.noise is None:
            return "no confidence interval"
        return "worse" if abs(gap.difference) > gap.noise else "within the noise"


def tests_of(group: Group) -> np.ndarray:
    rows = group.runs[0].rows
    assert rows
    return rows.test


def comparison(runs: Sequence[Run], metric: str) -> Comparison:
    """Group by what differs beside the seed, the best first."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = [key for key in keys if len({run.settings.get(key, "") for run in runs}) > 1]
    grouped: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        grouped.setdefault(tuple(run.settings.get(key, "") for key in differing), []).append(run)
    groups = [Group(dict(zip(differing, values, strict=True)), members) for values, members in grouped.items()]
    worst = -GOALS[metric] * float("inf")
    groups.sort(key=lambda g: -GOALS[metric] * (worst if g.value(metric) is None else g.value(metric) or 0.0))
    return Comparison(groups, differing, metric)
