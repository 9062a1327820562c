"""The before/after table of a report."""

import html
from typing import Any

from smolvlm_exp.evaluation.metrics import METRICS, Metric
from smolvlm_exp.reporting.html import NOTHING, empty, format_value, table
from smolvlm_exp.utils.formatting import MINUS, NBSP, as_finite, humanize, number, percent


def results(before: dict[str, Any], after: dict[str, Any], changes: dict[str, Any]) -> str:
    keys = [k for k in METRICS if k in before or k in after]
    keys += [k for k in {**before, **after} if k not in METRICS]
    rows = [
        _result(METRICS.get(k) or Metric(humanize(k), "", share=False), before.get(k), after.get(k), changes.get(k))
        for k in keys
    ]
    if not rows:
        return empty("No evaluation was part of this run.")
    return table("results", ["Held-out rows", "Before", "After", "", "Change"], rows)


def _result(metric: Metric, before: Any, after: Any, paired: Any) -> str:
    a, b = as_finite(before), as_finite(after)

    def cell(value: float | None, raw: Any) -> str:
        if value is None:
            return format_value(raw)
        return percent(value, 1) if metric.share else number(value)

    tone, change, track = "neutral", NOTHING, ""
    if a is not None and b is not None:
        lucky = isinstance(paired, dict) and paired["low"] <= 0 <= paired["high"]
        tone, change = _change(metric, b - a, lucky)
        if metric.share and 0 <= a <= 1 and 0 <= b <= 1:
            track = _track(a, b)
    note = f"<small>{html.escape(metric.note)}</small>" if metric.note else ""
    return (
        f'<tr class="{tone}"><th scope="row">{html.escape(metric.label)}{note}</th><td>{cell(a, before)}</td>'
        f'<td class="after">{cell(b, after)}</td><td class="track">{track}</td>'
        f'<td class="change">{change}{_sure(metric, paired)}</td></tr>'
    )


def _sure(metric: Metric, paired: Any) -> str:
    """The change's 95 % interval and the paired test's p, beneath it."""
    low, high, p = (as_finite(paired.get(key)) if isinstance(paired, dict) else None for key in ("low", "high", "p"))
    if low is None or high is None or p is None:
        return ""
    sizes = (f"{100 * abs(end):.1f}" if metric.share else number(abs(end)) for end in (low, high))
    ends = " to ".join(f"{MINUS if end < 0 else '+'}{size}" for end, size in zip((low, high), sizes, strict=True))
    return f"<small>{ends}, p {f'= {p:.3f}' if p >= 0.001 else '&lt; 0.001'}</small>"


def _change(metric: Metric, delta: float, lucky: bool) -> tuple[str, str]:
    """The row's tone (better, worse, neutral) and the words of its last cell.

    Args:
        lucky: the change may be nothing but luck.
    """
    size = f"{100 * abs(delta):.1f}" if metric.share else number(abs(delta))
    if not any(c in "123456789" for c in size):
        return "neutral", "no change"
    unit = f"{NBSP}points" if metric.share else ""
    tone = "neutral" if lucky or not metric.good else "better" if delta * metric.good > 0 else "worse"
    spoken = "" if tone == "neutral" else f' <span class="spoken">({tone})</span>'
    sign = "+" if delta > 0 else MINUS
    return tone, f'<span aria-hidden="true">{"↑" if delta > 0 else "↓"}</span> {sign}{size}{unit}{spoken}'


def _track(a: float, b: float) -> str:
    """From before (hollow) to after (filled) on a line from 0 to 100 %."""
    x, y = 6 + 108 * a, 6 + 108 * b
    return (
        '<svg viewBox="0 0 120 14" aria-hidden="true"><line class="rail" x1="6" x2="114" y1="7" y2="7"/>'
        f'<line class="way" x1="{x:.1f}" x2="{y:.1f}" y1="7" y2="7"/>'
        f'<circle class="from" cx="{x:.1f}" cy="7" r="3.6"/><circle class="to" cx="{y:.1f}" cy="7" r="4.4"/></svg>'
    )
