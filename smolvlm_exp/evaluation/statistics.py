"""Metrics with confidence intervals.

Every metric here is a ratio of two sums over the held-out rows (a mean is one over a sum of ones), so that one way of
resampling rows serves all: bootstrap intervals, and a paired test of one model against another on the same rows.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import TypeVar

import numpy as np

K = TypeVar("K", bound=Hashable)

# The 97.5 % quantile of Student's t, for 1 to 30 degrees of freedom; beyond 30 the last value is slightly too wide.
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
    """The percentile bootstrap's 95 % intervals over rows (Efron 1979). The same every time."""
    return {name: percentiles(values) for name, values in bootstrap(metrics).items()}


def changes(before: Mapping[str, Ratio], after: Mapping[str, Ratio]) -> dict[str, Change]:
    """Of the metrics that both have: a paired bootstrap of the difference, and a paired permutation test.

    Args:
        before, after: of the same rows.
    """
    pairs = {name: (before[name], metric) for name, metric in after.items() if name in before}
    drawn = bootstrap({(name, i): metric for name, pair in pairs.items() for i, metric in enumerate(pair)})
    return {
        name: Change(b.value - a.value, *percentiles(drawn[name, 1] - drawn[name, 0]), p=permutation_test(a, b))
        for name, (a, b) in pairs.items()
    }


def bootstrap(metrics: Mapping[K, Ratio]) -> dict[K, np.ndarray]:
    """(RESAMPLES,) values of each metric, over rows drawn with replacement.

    Drawing takes longer than counting, so metrics of equally many rows share the draws.
    """
    drawn: dict[K, list[np.ndarray]] = {key: [] for key in metrics}
    for rows in {len(metric.top) for metric in metrics.values()}:
        rng = np.random.default_rng(0)
        for size in portions(rows):
            # (size, rows): how often each row was drawn
            counts = rng.multinomial(rows, np.full(rows, 1 / rows), size).astype(np.float64)
            for key, metric in metrics.items():
                if len(metric.top) == rows:
                    drawn[key].append(metric.of(counts @ metric.top, counts @ metric.bottom))
    return {key: np.concatenate(values) for key, values in drawn.items()}


def permutation_test(a: Ratio, b: Ratio) -> float:
    """p of no difference, two-sided: how often it is as large when the two models are swapped row by row."""
    rows, extreme = len(a.top), 0
    assert len(b.top) == rows, "two evaluations of different rows cannot be paired"
    rng = np.random.default_rng(1)
    for size in portions(rows):
        swapped = rng.integers(0, 2, (size, rows)).astype(np.float64)
        top, bottom = swapped @ (b.top - a.top), swapped @ (b.bottom - a.bottom)
        swapped_b = b.of(b.top.sum() - top, b.bottom.sum() - bottom)
        swapped_a = a.of(a.top.sum() + top, a.bottom.sum() + bottom)
        extreme += int((np.abs(swapped_b - swapped_a) >= abs(b.value - a.value) - 1e-12).sum())
    return (1 + extreme) / (1 + RESAMPLES)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def portions(rows: int) -> Iterator[int]:
    """RESAMPLES in parts that fit in memory."""
    together = max(1, AT_ONCE // rows)
    for start in range(0, RESAMPLES, together):
        yield min(together, RESAMPLES - start)
