"""Metrics before and after as a person reads them, in the report and in the terminal."""

import sys
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from smolvlm_exp.evaluation.metrics import in_order, metric_of
from smolvlm_exp.evaluation.verdict import too_few, verdict
from smolvlm_exp.utils.formatting import MINUS, NBSP, number, percent

HEADLINE = ("chair_s", "preference_accuracy", "yes_no_accuracy", "recall", "reward_accuracy", "reward")


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
    return [result_row(key, before, after, changes.get(key)) for key in in_order({**before, **after})]


def result_row(
    key: str, before: dict[str, float], after: dict[str, float], paired: dict[str, float] | None
) -> ResultRow:
    metric = metric_of(key)
    a, b = before.get(key), after.get(key)
    old, new = ("" if n is None else percent(n, 1) if metric.share else number(n) for n in (a, b))
    row = ResultRow(metric.label, metric.note, old, new)
    if a is None or b is None:
        return row
    change, good = signed(b - a, metric.share), (b - a) * metric.good
    uncertain = paired is not None and paired["low"] <= 0 <= paired["high"]
    interval = format_interval(paired, metric.share) if paired else ""
    row = replace(row, change="no change", interval=interval, track=(a, b) if metric.share else None)
    if not any(digit in "123456789" for digit in change):
        return row
    return replace(
        row,
        tone="neutral" if uncertain or not good else "better" if good > 0 else "worse",
        arrow="↑" if b > a else "↓",
        change=f"{change}{NBSP}points" if metric.share else change,
    )


def format_interval(paired: dict[str, float], share: bool) -> str:
    """The change's 95 % interval and the paired test's p, which stays in one piece."""
    p = f"<{NBSP}0.001" if paired["p"] < 0.001 else f"={NBSP}{paired['p']:.3f}"
    return f"{signed(paired['low'], share)} to {signed(paired['high'], share)}, p{NBSP}{p}"


def signed(difference: float, share: bool) -> str:
    """With its sign, in points for shares of 1: `+5.6`."""
    size = f"{100 * abs(difference):.1f}" if share else number(abs(difference))
    return f"{MINUS if difference < 0 else '+'}{size}"


def headline(summary: dict[str, Any]) -> str:
    """One plain sentence that says what happened, from whatever was measured."""
    before, after, train = (summary.get(key, {}) for key in ("before", "after", "train"))
    keys = [k for k in HEADLINE if k in before and k in after] or [k for k in HEADLINE if k in after]
    parts = []
    for metric, key in ((metric_of(key), key) for key in keys[:2]):
        numbers = [values[key] for values in (before, after) if key in values]
        parts.append(f"{metric.label}: {' → '.join(map(percent if metric.share else number, numbers))}")
    if not parts and train.get("first_loss") is not None:
        parts = [f"Training loss: {number(train['first_loss'])} → {number(train['last_loss'])}"]
    sentence = "; ".join([*parts[:1], *(part[0].lower() + part[1:] for part in parts[1:])])
    start = "The run was stopped before its end. " if summary["status"] == "stopped" else ""
    if "reason" in summary:  # failed, or pruned by a search
        start = f"{summary['reason'].splitlines()[0]} "
    if few := too_few(summary.get("held_out_rows")):
        return f"{start}{few}."
    if said := verdict(summary, keys[:2]):
        start += f"{said.capitalize()}. "
    return f"{start}{sentence or 'Nothing was measured'}."


def wide_console() -> Console:
    """In a file as wide as the results' table; in a terminal as wide as that. Brackets in a text are text."""
    return Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
