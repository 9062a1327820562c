"""What each setting does to the metric: means over everything else, with Student's t intervals over the seeds."""

from dataclasses import dataclass
from statistics import mean, stdev

from smolvlm_exp.sweep.results import Outcome, Row

# The 97.5 % quantile of Student's t, for 1 to 30 degrees of freedom; beyond, the last one errs to the wide side.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Effect:
    """The metric's mean where a setting has this value."""

    value: str
    mean: float
    interval: float | None  # half of a 95 % interval over the seeds; None where there is but one
    seeds: int
    runs: int


def main_effects(found: Outcome) -> dict[str, list[Effect]]:
    """Setting -> an effect a value, over the combinations of all other settings in which every value has finished.

    Where a run is missing, its combination is left out for the other values too, so that like is compared with like.
    """
    return {key: effects_of(key, found) for key in found.varied}


def effects_of(key: str, found: Outcome) -> list[Effect]:
    blocks: dict[tuple[str, ...], dict[str, Row]] = {}
    others = [other for other in found.keys if other != key]
    for row in found.done:
        block = tuple(row.job.settings.get(other, "") for other in others)
        blocks.setdefault(block, {})[row.job.settings.get(key, "")] = row
    values = list(dict.fromkeys(row.job.settings.get(key, "") for row in found.rows))
    whole = [block for block in blocks.values() if len(block) == len(values)]
    return [effect(value, [block[value] for block in whole], found) for value in values] if whole else []


def effect(value: str, rows: list[Row], found: Outcome) -> Effect:
    seeds: dict[str, list[float]] = {}
    for row in rows:
        seeds.setdefault(row.job.settings.get("seed", ""), []).append(found.measured(row))
    means = [mean(values) for values in seeds.values()]
    n = len(means)
    interval = T[min(n - 1, len(T)) - 1] * stdev(means) / n**0.5 if n > 1 else None
    return Effect(value, mean(means), interval, n, len(rows))
