"""The before/after table of a report."""

from dataclasses import dataclass, replace

from smolvlm_exp.evaluation.metrics import METRICS, Metric
from smolvlm_exp.utils.formatting import MINUS, NBSP, humanize, number, percent


@dataclass(frozen=True)
class ResultRow:
    label: str
    note: str
    before: str
    after: str
    tone: str = "neutral"  # better or worse, where the change is more than chance
    arrow: str = ""
    change: str = ""
    interval: str = ""  # of the change, at 95 %, and the paired test's p
    track: tuple[float, float] | None = None  # before and after, where both are shares of 1


def result_rows(
    before: dict[str, float], after: dict[str, float], changes: dict[str, dict[str, float]]
) -> list[ResultRow]:
    keys = [*METRICS, *(key for key in {**before, **after} if key not in METRICS)]
    return [result_row(key, before, after, changes.get(key)) for key in keys if key in before or key in after]


def result_row(
    key: str, before: dict[str, float], after: dict[str, float], paired: dict[str, float] | None
) -> ResultRow:
    metric = METRICS.get(key) or Metric(humanize(key), "", share=False)
    numbers = [values.get(key) for values in (before, after)]
    texts = ("" if n is None else percent(n, 1) if metric.share else number(n) for n in numbers)
    row, (a, b) = ResultRow(metric.label, metric.note, next(texts), next(texts)), numbers
    if a is None or b is None:
        return row
    size = f"{100 * abs(b - a):.1f}" if metric.share else number(abs(b - a))
    interval, chance = "", False
    if paired:
        interval, chance = format_interval(paired, metric.share), paired["low"] <= 0 <= paired["high"]
    row = replace(row, change="no change", interval=interval, track=(a, b) if metric.share else None)
    if not any(digit in "123456789" for digit in size):
        return row
    good = (b - a) * metric.good
    return replace(
        row,
        tone="neutral" if chance or not good else "better" if good > 0 else "worse",
        arrow="↑" if b > a else "↓",
        change=f"{'+' if b > a else MINUS}{size}{f'{NBSP}points' if metric.share else ''}",
    )


def format_interval(paired: dict[str, float], share: bool) -> str:
    """The change's 95 % interval and the paired test's p."""
    ends, p = (paired["low"], paired["high"]), paired["p"]
    sizes = [f"{100 * abs(end):.1f}" if share else number(abs(end)) for end in ends]
    low, high = (f"{MINUS if end < 0 else '+'}{size}" for end, size in zip(ends, sizes, strict=True))
    return f"{low} to {high}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
