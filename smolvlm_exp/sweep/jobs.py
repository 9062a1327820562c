"""The jobs of a sweep: what they are, what differs between them, and what they are called."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

VIEWS = ("keep", "metric")  # what a sweep does with its jobs: no part of what a job is


@dataclass(frozen=True)
class Job:
    """One run of a sweep. `number` is its folder's name; what it is are its overrides."""

    number: int
    overrides: tuple[str, ...]  # as typed for a single run: `adapter.r=8`

    @property
    def settings(self) -> dict[str, str]:
        """Key -> value as typed."""
        return dict(split(override) for override in self.overrides)

    @property
    def identity(self) -> frozenset[str]:
        return frozenset(override for override in self.overrides if not is_view(override))


def is_view(override: str) -> bool:
    return split(override)[0] in VIEWS


def split(override: str) -> tuple[str, str]:
    """`+adapter.r=8` -> (`adapter.r`, `8`)."""
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def differing(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """The keys whose values are not the same in all jobs, with those values, each in the order of the jobs."""
    values: dict[str, dict[str, None]] = {}
    for job in jobs:
        for key, value in job.settings.items():
            values.setdefault(key, {})[value] = None
    return {key: list(found) for key, found in values.items() if len(found) > 1 and key not in VIEWS}


def short(keys: Sequence[str]) -> dict[str, str]:
    """Full key -> its last part (`adapter.r` -> `r`), or all of it where two keys end alike."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: end if last.count(end) == 1 else key for key, end in zip(keys, last, strict=True)}


def label(job: Job, keys: Sequence[str]) -> str:
    """What tells this job from the others: `r=8 learning_rate=5e-05`."""
    names = short(keys)
    return " ".join(f"{names[key]}={brief(job.settings[key])}" for key in keys if key in job.settings)


def brief(value: str) -> str:
    """A value as typed, a long number to four digits."""
    number = typed(value)
    return f"{number:.4g}" if isinstance(number, float) and len(value) > 8 else value


def typed(value: str) -> Any:
    """A value as typed -> the number it is, where it is one."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
