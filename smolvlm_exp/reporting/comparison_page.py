"""How task=compare is shown: compare.html and the table in the terminal, groups of runs with the best first."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.table import Table

from smolvlm_exp.evaluation.comparison import Comparison, Group, Run
from smolvlm_exp.evaluation.metrics import goal_of, is_share, metric_of
from smolvlm_exp.evaluation.verdict import too_few
from smolvlm_exp.reporting.charts import chart_styles, line_chart
from smolvlm_exp.reporting.html import render
from smolvlm_exp.reporting.report import CURVES
from smolvlm_exp.reporting.results import wide_console
from smolvlm_exp.reporting.side_by_side import side_by_side
from smolvlm_exp.runs.event_log import metric_points, read_events
from smolvlm_exp.utils.formatting import MINUS, humanize, percent, short_keys, short_value
from smolvlm_exp.utils.paths import relative_to_cwd

log = logging.getLogger(__name__)

POINTS = " points"
NAMES = {"chair_s": "CHAIR_s", "chair_i": "CHAIR_i", "cog": "Cog"}  # as the papers have them
ARROWS = {1: "↑", -1: "↓", 0: ""}
COLUMNS = 5  # of a table of metrics: more are too wide for a page
COSTS = {"train.seconds": "seconds", "train.memory_peak_gib": "GiB", "train.pairs_per_second": "pairs/s"}
COST_HEADS = dict(zip(COSTS, ("Training time, s", "Peak memory, GiB", "Pairs/s"), strict=True))


def format_metric(path: str, value: float | None, error: float | None) -> str:
    """A metric's value with half of its 95 % interval."""
    if value is None:
        return ""
    text = percent(value, 1) if is_share(path) else f"{value:.3g}"
    if error is None:
        return text
    return f"{text} ± {100 * error:.1f}" if is_share(path) else f"{text} ± {error:.2g}"


def column_name(path: str) -> str:
    """With an arrow in the direction that is better."""
    key = path.partition(".")[2]
    return f"{NAMES.get(key, humanize(key))} {ARROWS[goal_of(path)]}".strip()


def delta(comparison: Comparison, group: Group) -> str:
    """A group's difference to the best with half of its 95 % interval: `-5.6 ± 2.9 points`."""
    if group is comparison.groups[0] or group.value(comparison.metric) is None:
        return ""
    gap, share = comparison.gap(group), is_share(comparison.metric)
    size, noise = (f"{100 * n:.1f}" if share else f"{n:.3g}" for n in (abs(gap.difference), gap.noise or 0.0))
    off = "" if gap.noise is None else f" ± {noise}"
    return f"{MINUS if gap.difference < 0 else '+'}{size}{off}{POINTS if share else ''}"


def print_comparison(comparison: Comparison) -> None:
    first = comparison.metrics[:2]  # 80 columns hold no more
    table = Table(*short_keys(comparison.keys).values(), "runs", "", *map(column_name, first), *COSTS.values())
    for column in table.columns:
        column.overflow = "fold"
    for group in comparison.groups:
        verdict = f"{comparison.verdict(group)}\n{delta(comparison, group).removesuffix(POINTS)}".strip()
        numbers = [format_metric(path, group.value(path), group.error(path)) for path in first]
        costs = [format_metric(path, group.value(path), None) for path in COSTS]
        table.add_row(*map(short_value, group.settings.values()), str(len(group.runs)), verdict, *numbers, *costs)
    counts = held_out_rows(comparison)
    table.caption = too_few(min(counts, default=None)) or f"{' to '.join(map(str, counts)) or '?'} held-out rows"
    wide_console().print(table)
    if changed := comparison.rows_changed:
        log.warning(f"data: {changed}")


def comparison_page(comparison: Comparison, folder: Path) -> str:
    """compare.html, in `folder`: the table, answers side by side, and the curves of all runs over each other."""
    runs = [(run_name(group, run), group, run) for group in comparison.groups for run in group.runs]
    groups = {name: group_name(group) or name for name, group, _ in runs}
    # The deciding numbers are in the first table, with the settings; further metrics by the group's name.
    first = [*comparison.metrics[:1], *COSTS]
    settings = short_keys(comparison.keys).values()
    further = [comparison.metrics[i : i + COLUMNS] for i in range(1, len(comparison.metrics), COLUMNS)]
    return render(
        "compare.html.jinja",
        kind="",
        heading="Comparison",
        lead=lead(comparison),
        head=[*settings, "Runs", "Verdict", "Difference to best", *map(column_head, first)],
        rows=[table_row(comparison, group, first) for group in comparison.groups],
        metrics=[
            (["Runs with", *map(column_head, paths)], [metric_row(group, paths) for group in comparison.groups])
            for paths in further
        ],
        samples=side_by_side(
            [(group_name(group) or run_name(group, group.runs[0]), group.runs[0].folder) for group in comparison.groups]
        ),
        curves=draw_curves(runs, groups),
        legend={style: groups[name] for name, style in chart_styles(groups).items()}.items(),
        reports=[
            (name, relative_to_cwd(run.folder), quote(os.path.relpath(run.folder / "report.html", folder)))
            for name, _, run in runs
        ],
    )


def column_head(path: str) -> str:
    """In plain words, where there is room for them."""
    return COST_HEADS.get(path) or f"{metric_of(path.partition('.')[2]).label} {ARROWS[goal_of(path)]}".strip()


def table_row(comparison: Comparison, group: Group, paths: Sequence[str]) -> dict[str, Any]:
    verdict = comparison.verdict(group)
    numbers = [format_metric(path, group.value(path), group.error(path)) for path in paths]
    return {
        "tone": {"best": "better", "worse": "worse"}.get(verdict, ""),
        "settings": [*map(short_value, group.settings.values()), len(group.runs)],
        "verdict": verdict,
        "cells": [delta(comparison, group), *numbers],
    }


def metric_row(group: Group, paths: Sequence[str]) -> list[str]:
    numbers = [format_metric(path, group.value(path), group.error(path)) for path in paths]
    return [group_name(group) or "all alike", *numbers]


def lead(comparison: Comparison) -> str:
    """The result in a sentence or three."""
    best, metric = comparison.groups[0], comparison.metric
    count = sum(len(group.runs) for group in comparison.groups)
    counts = held_out_rows(comparison)
    rows = f", on {' to '.join(map(str, counts))} held-out rows" if counts else ""
    sentences = [f"{count} runs, compared by {column_name(metric)}{rows}."]
    sentences += [f"Warning: {changed}." for changed in [comparison.rows_changed] if changed]
    if few := too_few(min(counts, default=None)):
        return " ".join([*sentences, f"{few}."])
    befores = {
        run.summary.get("before", {}).get(metric.partition(".")[2]) for group in comparison.groups for run in group.runs
    }
    if metric.startswith("after.") and len(befores) == 1 and None not in befores:
        sentences.append(f"Before tuning: {format_metric(metric, befores.pop(), None)}.")
    value = format_metric(metric, best.value(metric), best.error(metric))
    sentences.append(f"Best: {group_name(best) or 'all alike'}, {value}.")
    for verdict in ("worse", "within the noise"):
        names = [group_name(group) for group in comparison.groups if comparison.verdict(group) == verdict]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        sentences += [f"{verdict.capitalize()}: {'; '.join(names[:4])}{more}."] if names else []
    return " ".join(sentences)


def held_out_rows(comparison: Comparison) -> list[int]:
    """The least and the largest number that a run has, or the only one; empty where no run says."""
    known = (run.summary.get("held_out_rows") for group in comparison.groups for run in group.runs)
    counts = [count for count in known if isinstance(count, int)]
    return sorted({min(counts), max(counts)}) if counts else []


def group_name(group: Group) -> str:
    """The settings in which a group differs: `r=8 learning_rate=0.001`."""
    names = short_keys(list(group.settings))
    return " ".join(f"{names[key]}={short_value(value)}" for key, value in group.settings.items())


def run_name(group: Group, run: Run) -> str:
    """A run's group and its seed or, where two have the same, its folder."""
    seeds, seed = [other.summary.get("seed") for other in group.runs], run.summary.get("seed")
    own = f"seed={seed}" if seeds.count(seed) == 1 else str(relative_to_cwd(run.folder))
    name = group_name(group)
    return f"{name} {own}".strip() if len(seeds) > 1 else name or own


def draw_curves(runs: Sequence[tuple[str, Group, Run]], groups: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """The charts in their groups: one per quantity, one line per run, one colour per group of runs."""
    events = {name: read_events(run.folder / "metrics.jsonl") for name, _, run in runs}
    drawn = []
    for heading, curves in CURVES.items():
        charts = [
            line_chart(
                {name: metric_points(logged, key) for name, logged in events.items()},
                f"{title}, {kind}" if len(keys) > 1 else title,
                alike=groups,
                legend=False,
                **options,
            )
            for title, keys, options in curves
            for kind, key in keys.items()
        ]
        drawn.append((heading, [chart for chart in charts if chart]))
    return [(heading, charts) for heading, charts in drawn if charts]
