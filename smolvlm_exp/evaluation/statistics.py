"""Metrics that know how sure they are.

Every metric here is a ratio of two sums over the held-out rows (a mean is one over a sum of ones), so that one way of
resampling rows serves all: bootstrap intervals, and a paired test of one model against another on the same rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

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


def interval(metric: Ratio) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval over rows (Efron 1979). The same every time."""
    return percentiles(
        np.concatenate([metric.of(n @ metric.top, n @ metric.bottom) for n in resamples(len(metric.top))])
    )


def compare(before: Ratio, after: Ratio) -> Change:
    """A paired bootstrap of the difference, and a permutation test that swaps the two models row by row.

    Args:
        before, after: the same metric of the same rows.
    """
    rows = len(before.top)
    assert len(after.top) == rows, "two evaluations of different rows cannot be paired"
    difference = after.value - before.value
    differences = [
        after.of(counts @ after.top, counts @ after.bottom) - before.of(counts @ before.top, counts @ before.bottom)
        for counts in resamples(rows)
    ]
    top, bottom = after.top - before.top, after.bottom - before.bottom
    extreme = 0
    for swapped in swaps(rows):
        moved, moved_bottom = swapped @ top, swapped @ bottom
        found = after.of(after.top.sum() - moved, after.bottom.sum() - moved_bottom)
        found = found - before.of(before.top.sum() + moved, before.bottom.sum() + moved_bottom)
        extreme += int((np.abs(found) >= abs(difference) - 1e-12).sum())
    return Change(difference, *percentiles(np.concatenate(differences)), p=(1 + extreme) / (1 + RESAMPLES))


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
