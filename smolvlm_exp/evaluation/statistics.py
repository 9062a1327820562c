"""Metrics that know how sure they are.

Every metric here is a ratio of two sums over the held-out rows (a mean is one over a sum of ones), so that one way of
resampling rows serves all: bootstrap intervals, and a paired test of one model against another on the same rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev

import numpy as np

# The 97.5 % quantile of Student's t, for 1 to 30 degrees of freedom; beyond, the last one errs to the wide side.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


RESAMPLES = 2000
LEVEL = 0.95
AT_ONCE = 2**21  # resampled rows in memory together


@dataclass(frozen=True)
class Ratio:
    """sum_i top_i / sum_i bottom_i; `empty` where the lower sum is zero.

    Attributes:
        top, bottom: (rows,) float64, what each row adds.
    """

    top: np.ndarray
    bottom: np.ndarray
    empty: float = 0.0

    @property
    def value(self) -> float:
        return float(self.of(self.top.sum(), self.bottom.sum()))

    def of(self, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.divide(top, bottom, out=np.full(np.shape(bottom), self.empty), where=bottom != 0)


@dataclass(frozen=True)
class Change:
    """One model against another on the same rows."""

    difference: float  # after minus before
    low: float  # of the difference's 95 % interval
    high: float
    p: float  # two-sided, of no difference


def ratio(top: Sequence[float], bottom: Sequence[float], empty: float = 0.0) -> Ratio:
    return Ratio(np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64), empty)


def mean(values: Sequence[float]) -> Ratio:
    """A row's value, averaged."""
    return ratio(values, [1.0] * len(values))


def t_interval(values: Sequence[float]) -> float | None:
    """Half of Student's 95 % interval of a mean; None for a single value."""
    n = len(values)
    return T[min(n - 1, len(T)) - 1] * stdev(values) / n**0.5 if n > 1 else None


def intervals(metrics: Mapping[str, Ratio]) -> dict[str, tuple[float, float]]:
    """The percentile bootstrap's 95 % intervals over rows (Efron 1979). The same every time.

    Drawing takes longer than counting, so metrics of equally many rows share the draws.
    """
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for rows, alike in by_rows(metrics).items():
        for counts in resamples(rows):
            for name, metric in alike.items():
                drawn[name].append(metric.of(counts @ metric.top, counts @ metric.bottom))
    return {name: percentiles(np.concatenate(values)) for name, values in drawn.items()}


def changes(before: Mapping[str, Ratio], after: Mapping[str, Ratio]) -> dict[str, Change]:
    """Of the metrics that both have: a paired bootstrap of the difference, and a permutation test that swaps the two
    models row by row.

    Args:
        before, after: of the same rows.
    """
    both = {name: metric for name, metric in after.items() if name in before}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in both}
    extreme = dict.fromkeys(both, 0)
    for rows, alike in by_rows(both).items():
        pairs = [(name, before[name], metric) for name, metric in alike.items()]
        for _, a, _ in pairs:
            assert len(a.top) == rows, "two evaluations of different rows cannot be paired"
        for counts in resamples(rows):
            for name, a, b in pairs:
                drawn[name].append(b.of(counts @ b.top, counts @ b.bottom) - a.of(counts @ a.top, counts @ a.bottom))
        for swapped in swaps(rows):
            for name, a, b in pairs:
                moved, moved_bottom = swapped @ (b.top - a.top), swapped @ (b.bottom - a.bottom)
                difference = b.of(b.top.sum() - moved, b.bottom.sum() - moved_bottom)
                difference = difference - a.of(a.top.sum() + moved, a.bottom.sum() + moved_bottom)
                extreme[name] += int((np.abs(difference) >= abs(b.value - a.value) - 1e-12).sum())
    return {
        name: Change(
            after[name].value - before[name].value,
            *percentiles(np.concatenate(differences)),
            p=(1 + extreme[name]) / (1 + RESAMPLES),
        )
        for name, differences in drawn.items()
    }


def by_rows(metrics: Mapping[str, Ratio]) -> dict[int, dict[str, Ratio]]:
    groups: dict[int, dict[str, Ratio]] = {}
    for name, metric in metrics.items():
        groups.setdefault(len(metric.top), {})[name] = metric
    return groups


def percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resamples(rows: int) -> Iterator[np.ndarray]:
    """(some, rows) float64, RESAMPLES in all: how often each row was drawn, rows in all."""
    draw = np.random.default_rng(0)
    for some in portions(rows):
        yield draw.multinomial(rows, np.full(rows, 1 / rows), size=some).astype(np.float64)


def swaps(rows: int) -> Iterator[np.ndarray]:
    """(some, rows) float64 of 0 and 1, RESAMPLES in all."""
    draw = np.random.default_rng(1)
    for some in portions(rows):
        yield draw.integers(0, 2, size=(some, rows)).astype(np.float64)


def portions(rows: int) -> Iterator[int]:
    together = max(1, AT_ONCE // rows)
    for start in range(0, RESAMPLES, together):
        yield min(together, RESAMPLES - start)
