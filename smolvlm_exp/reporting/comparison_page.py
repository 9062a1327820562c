"""task=compare for people: compare.html and the table in the terminal, groups of runs with the best first."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from smolvlm_exp.evaluation.comparison import Comparison, Group, Run
from smolvlm_exp.evaluation.metrics import GOALS, METRICS
from smolvlm_exp.reporting.charts import line_chart
from smolvlm_exp.reporting.html import render
from smolvlm_exp.reporting.report import CURVES
from smolvlm_exp.runs.event_log import metric_points, read_events
from smolvlm_exp.utils.formatting import MINUS, humanize, percent, short_keys, short_value
from smolvlm_exp.utils.paths import relative_to_cwd

POINTS = " points"
NAMES = {"chair_s": "CHAIR_s", "chair_i": "CHAIR_i", "cog": "Cog"}  # as the papers have them
ARROWS = {1: "↑", -1: "↓", 0: ""}
COSTS = {"train.seconds": "seconds", "train.memory_peak_gib": "GiB", "train.pairs_per_second": "pairs/s"}


def format_metric(path: str, value: float | None, error: float | None) -> str:
    """A metric's value with half of its 95 % interval."""
    if value is None:
        return ""
    share = path.startswith("after.") and METRICS[path.partition(".")[2]].share
    text = percent(value, 1) if share else f"{value:.3g}"
    return text if error is None else f"{text} ± {100 * error:.1f}" if share else f"{text} ± {error:.2g}"


def column_name(path: str) -> str:
    """With an arrow to where it is better."""
    key = path.partition(".")[2]
    return f"{NAMES.get(key, humanize(key))} {ARROWS[GOALS.get(path, 0)]}".strip()


def delta(comparison: Comparison, group: Group) -> str:
    """A group's difference to the best with half of its 95 % interval: `-5.6 ± 2.9 points`."""
    if group is comparison.groups[0] or group.value(comparison.metric) is None:
        return ""
    gap, key = comparison.gaps[comparison.groups.index(group)], comparison.metric.partition(".")[2]
    points = comparison.metric.startswith("after.") and METRICS[key].share
    size, noise = (f"{100 * n:.1f}" if points else f"{n:.3g}" for n in (abs(gap.difference), gap.noise or 0.0))
    off = "" if gap.noise is None else f" ± {noise}"
    return f"{MINUS if gap.difference < 0 else '+'}{size}{off}{POINTS if points else ''}"


def print_comparison(comparison: Comparison) -> None:
    names = short_keys(comparison.keys)
    first = comparison.metrics[:2]  # 80 columns hold no more
    lines = Table(*names.values(), "runs", "", *map(column_name, first), *COSTS.values())
    for column in lines.columns:
        column.overflow = "fold"
    for group in comparison.groups:
        settings = [short_value(group.settings[key]) for key in comparison.keys]
        numbers = [format_metric(path, group.value(path), group.error(path)) for path in first]
        costs = [format_metric(path, group.value(path), None) for path in COSTS]
        verdict = f"{comparison.verdict(group)}\n{delta(comparison, group).removesuffix(POINTS)}".strip()
        lines.add_row(*settings, str(len(group.runs)), verdict, *numbers, *costs)
    Console().print(lines)


def comparison_page(comparison: Comparison, folder: Path) -> str:
    """compare.html, in `folder`: the table, and the curves of all runs over each other."""
    runs = [
        (run_name(comparison, group, run), group_name(comparison, group), run)
        for group in comparison.groups
        for run in group.runs
    ]
    # What decides is in sight before anything is scrolled.
    paths = [*comparison.metrics[:3], *COSTS, *comparison.metrics[3:]]
    heads = (COSTS.get(path) or column_name(path) for path in paths)
    return render(
        "compare.html.jinja",
        kind="",
        heading="Comparison",
        lead=lead(comparison),
        head=[*short_keys(comparison.keys).values(), "Runs", "", "Δ to best", *heads],
        rows=[table_row(comparison, group, paths) for group in comparison.groups],
        curves=curves(runs),
        reports=[
            (name, relative_to_cwd(run.folder), quote(os.path.relpath(run.folder / "report.html", folder)))
            for name, _, run in runs
        ],
    )


def table_row(comparison: Comparison, group: Group, paths: Sequence[str]) -> dict[str, Any]:
    verdict = comparison.verdict(group)
    return {
        "tone": {"best": "better", "worse": "worse"}.get(verdict, ""),
        "settings": [short_value(group.settings[key]) for key in comparison.keys],
        "runs": len(group.runs),
        "verdict": verdict,
        "cells": [
            delta(comparison, group),
            *(format_metric(path, group.value(path), group.error(path)) for path in paths),
        ],
    }


def lead(comparison: Comparison) -> str:
    """The result in a sentence or three."""
    best, metric = comparison.groups[0], comparison.metric
    count = sum(len(group.runs) for group in comparison.groups)
    sentences = [f"{count} runs, compared by {column_name(metric)}."]
    befores = {
        run.summary.get("before", {}).get(metric.partition(".")[2]) for group in comparison.groups for run in group.runs
    }
    if metric.startswith("after.") and len(befores) == 1 and None not in befores:
        sentences.append(f"Before tuning: {format_metric(metric, befores.pop(), None)}.")
    value = format_metric(metric, best.value(metric), best.error(metric))
    sentences.append(f"Best: {group_name(comparison, best) or 'all alike'}, {value}.")
    for verdict in ("worse", "within the noise"):
        names = [group_name(comparison, group) for group in comparison.groups if comparison.verdict(group) == verdict]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        sentences += [f"{verdict.capitalize()}: {'; '.join(names[:4])}{more}."] if names else []
    return " ".join(sentences)


def group_name(comparison: Comparison, group: Group) -> str:
    """What tells a group from the others: `r=8 learning_rate=0.001`."""
    names = short_keys(comparison.keys)
    return " ".join(f"{names[key]}={short_value(value)}" for key, value in group.settings.items())


def run_name(comparison: Comparison, group: Group, run: Run) -> str:
    """A run's group and its seed or, where two have the same, its folder."""
    seeds, seed = [other.summary.get("seed") for other in group.runs], run.summary.get("seed")
    own = f"seed={seed}" if seeds.count(seed) == 1 else str(relative_to_cwd(run.folder))
    name = group_name(comparison, group)
    return f"{name} {own}".strip() if len(seeds) > 1 else name or own


def curves(runs: Sequence[tuple[str, str, Run]]) -> list[str]:
    """One chart per quantity, one line per run, one colour per group."""
    drawn, groups = [], {name: group or name for name, group, _ in runs}
    events = {name: read_events(run.folder / "metrics.jsonl") for name, _, run in runs}
    for title, keys, options in CURVES:
        for kind, key in keys.items():
            series = {name: metric_points(logged, key) for name, logged in events.items()}
            drawn.append(line_chart(series, f"{title}, {kind}" if len(keys) > 1 else title, alike=groups, **options))
    return [chart for chart in drawn if chart]
