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


def written(path: str, value: float | None, error: float | None) -> str:
    """A number for people, with what it may be off by."""
    if value is None:
        return ""
    share = path.startswith("after.") and METRICS[path.partition(".")[2]].share
    text, off = (
        (percent(value, 1), f" ± {100 * (error or 0):.1f}") if share else (f"{value:.3g}", f" ± {error or 0:.2g}")
    )
    return text + (off if error is not None else "")


def headed(path: str) -> str:
    """A column's name, with an arrow to where it is better."""
    key = path.partition(".")[2]
    return f"{NAMES.get(key, humanize(key))} {ARROWS[GOALS.get(path, 0)]}".strip()


def apart(found: Comparison, group: Group) -> str:
    """How far a group is from the best, and how far it may be by luck: `-5.6 ± 2.9 points`."""
    if group is found.groups[0] or group.value(found.metric) is None:
        return ""
    gap, key = found.gap(group), found.metric.partition(".")[2]
    points = found.metric.startswith("after.") and METRICS[key].share
    size, noise = (f"{100 * n:.1f}" if points else f"{n:.3g}" for n in (abs(gap.difference), gap.noise or 0.0))
    off = "" if gap.noise is None else f" ± {noise}"
    return f"{MINUS if gap.difference < 0 else '+'}{size}{off}{POINTS if points else ''}"


def show(found: Comparison) -> None:
    names = short_keys(found.keys)
    first = found.metrics[:2]  # 80 columns hold no more
    lines = Table(*names.values(), "runs", "", *map(headed, first), *COSTS.values())
    for column in lines.columns:
        column.overflow = "fold"
    for group in found.groups:
        settings = [short_value(group.settings[key]) for key in found.keys]
        numbers = [written(path, group.value(path), group.error(path)) for path in first]
        costs = [written(path, group.value(path), None) for path in COSTS]
        verdict = f"{found.verdict(group)}\n{apart(found, group).removesuffix(POINTS)}".strip()
        lines.add_row(*settings, str(len(group.runs)), verdict, *numbers, *costs)
    Console().print(lines)


def document(found: Comparison, folder: Path) -> str:
    """compare.html, in `folder`: the table, and the curves of all runs over each other."""
    runs = [(name_of(found, group, run), called(found, group), run) for group in found.groups for run in group.runs]
    paths = [*found.metrics[:3], *COSTS, *found.metrics[3:]]  # what decides is in sight before anything is scrolled
    heads = (COSTS.get(path) or headed(path) for path in paths)
    return render(
        "compare.html.jinja",
        kind="",
        heading="Comparison",
        lead=lead(found),
        head=[*short_keys(found.keys).values(), "Runs", "", "Δ to best", *heads],
        rows=[table_row(found, group, paths) for group in found.groups],
        curves=curves(runs),
        reports=[
            (name, relative_to_cwd(run.folder), quote(os.path.relpath(run.folder / "report.html", folder)))
            for name, _, run in runs
        ],
    )


def table_row(found: Comparison, group: Group, paths: Sequence[str]) -> dict[str, Any]:
    verdict = found.verdict(group)
    return {
        "tone": {"best": "better", "worse": "worse"}.get(verdict, ""),
        "settings": [short_value(group.settings[key]) for key in found.keys],
        "runs": len(group.runs),
        "verdict": verdict,
        "cells": [apart(found, group), *(written(path, group.value(path), group.error(path)) for path in paths)],
    }


def lead(found: Comparison) -> str:
    """What came of it, in a sentence or three."""
    best, metric = found.groups[0], found.metric
    count = sum(len(group.runs) for group in found.groups)
    told = [f"{count} runs, compared by {headed(metric)}."]
    befores = {
        run.summary.get("before", {}).get(metric.partition(".")[2]) for group in found.groups for run in group.runs
    }
    if metric.startswith("after.") and len(befores) == 1 and None not in befores:
        told.append(f"Before tuning: {written(metric, befores.pop(), None)}.")
    told.append(
        f"Best: {called(found, best) or 'all alike'}, {written(metric, best.value(metric), best.error(metric))}."
    )
    if len(found.groups) > 1:
        worse = [called(found, group) for group in found.groups if found.verdict(group) == "worse"]
        alike = [called(found, group) for group in found.groups if found.verdict(group) == "within the noise"]
        told += [f"Worse: {some(worse)}."] if worse else []
        told += [f"Within the noise: {some(alike)}."] if alike else []
    return " ".join(told)


def some(names: list[str]) -> str:
    return "; ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def called(found: Comparison, group: Group) -> str:
    """What tells a group from the others: `r=8 learning_rate=0.001`."""
    names = short_keys(found.keys)
    return " ".join(f"{names[key]}={short_value(value)}" for key, value in group.settings.items())


def name_of(found: Comparison, group: Group, run: Run) -> str:
    """A run's: its group, and its seed or, where two have the same, its folder."""
    seeds = [each.summary.get("seed") for each in group.runs]
    own = (
        f"seed={run.summary.get('seed')}"
        if seeds.count(run.summary.get("seed")) == 1
        else str(relative_to_cwd(run.folder))
    )
    return f"{called(found, group)} {own}".strip() if len(seeds) > 1 else called(found, group) or own


def curves(runs: Sequence[tuple[str, str, Run]]) -> list[str]:
    """One chart per quantity, one line per run, one colour per group."""
    drawn, groups = [], {name: group or name for name, group, _ in runs}
    events = {name: read_events(run.folder / "metrics.jsonl") for name, _, run in runs}
    for title, keys, options in CURVES:
        for kind, key in keys.items():
            series = {name: metric_points(each, key) for name, each in events.items()}
            drawn.append(line_chart(series, f"{title}, {kind}" if len(keys) > 1 else title, alike=groups, **options))
    return [chart for chart in drawn if chart]
