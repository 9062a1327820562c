"""What each setting does to the metric: means over everything else, with Student's t intervals over the seeds."""

from dataclasses import dataclass
from statistics import mean, stdev

from smolvlm_exp.evaluation.statistics import T
from smolvlm_exp.sweep.results import JobResult, SweepResults


@dataclass(frozen=True)
class Effect:
    """The metric's mean where a setting has this value."""

    value: str
    mean: float
    interval: float | None  # half of a 95 % interval over the seeds; None where there is but one
    seeds: int
    runs: int


def main_effects(found: SweepResults) -> dict[str, list[Effect]]:
    """Setting -> an effect a value, over the combinations of all other settings in which every value has finished.

    Where a run is missing, its combination is left out for the other values too, so that like is compared with like.
    """
    return {key: effects_of(key, found) for key in found.varied}


def effects_of(key: str, found: SweepResults) -> list[Effect]:
    blocks: dict[tuple[str, ...], dict[str, JobResult]] = {}
    others = [other for other in found.keys if other != key]
    for row in found.done:
        block = tuple(row.job.settings.get(other, "") for other in others)
        blocks.setdefault(block, {})[row.job.settings.get(key, "")] = row
    values = list(dict.fromkeys(row.job.settings.get(key, "") for row in found.rows))
    whole = [block for block in blocks.values() if len(block) == len(values)]
    return [effect(value, [block[value] for block in whole], found) for value in values] if whole else []


def effect(value: str, rows: list[JobResult], found: SweepResults) -> Effect:
    seeds: dict[str, list[float]] = {}
    for row in rows:
        seeds.setdefault(row.job.settings.get("seed", ""), []).append(found.measured(row))
    means = [mean(values) for values in seeds.values()]
    n = len(means)
    interval = T[min(n - 1, len(T)) - 1] * stdev(means) / n**0.5 if n > 1 else None
    return Effect(value, mean(means), interval, n, len(rows))
