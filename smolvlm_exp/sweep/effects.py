"""Main effects: the metric's mean for each value of a setting, over all other settings, with intervals over seeds."""

from dataclasses import dataclass
from statistics import mean

from smolvlm_exp.evaluation.statistics import t_interval
from smolvlm_exp.sweep.results import JobResult, SweepResults


@dataclass(frozen=True)
class Effect:
    """The metric's mean over the jobs where a setting has this value."""

    value: str
    mean: float
    interval: float | None  # half of a 95 % interval over the seeds; None for a single seed
    seeds: int
    jobs: int


def main_effects(results: SweepResults) -> dict[str, list[Effect]]:
    """Setting -> an effect per value, over the combinations of all other settings in which every value has finished.

    Where a job is missing, its combination is left out for the other values too, so that like is compared with like.
    """
    effects: dict[str, list[Effect]] = {}
    for key in results.settings:
        blocks: dict[tuple[str, ...], dict[str, JobResult]] = {}
        others = [other for other in results.keys if other != key]
        for job in results.done:
            block = tuple(job.settings.get(other, "") for other in others)
            blocks.setdefault(block, {})[job.settings.get(key, "")] = job
        values = dict.fromkeys(job.settings.get(key, "") for job in results.jobs)
        complete = [block for block in blocks.values() if len(block) == len(values)]
        effects[key] = [effect(v, [block[v] for block in complete], results) for v in values] if complete else []
    return effects


def effect(value: str, jobs: list[JobResult], results: SweepResults) -> Effect:
    seeds: dict[str, list[float]] = {}
    for job in jobs:
        seeds.setdefault(job.settings.get("seed", ""), []).append(results.measured(job))
    means = [mean(values) for values in seeds.values()]
    return Effect(value, mean(means), t_interval(means), len(means), len(jobs))
