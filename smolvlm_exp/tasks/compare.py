"""task=compare: finished runs beside each other, from their folders alone: what differs, what came of it, what is luck.

Runs that differ in their seed alone are one line. What a difference has to exceed is in comparison.py.
"""

import csv
import html
import os
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from smolvlm_exp.config.schema import Config
from smolvlm_exp.evaluation.comparison import Comparison, Group, Run, comparison
from smolvlm_exp.evaluation.metrics import GOALS, METRICS
from smolvlm_exp.evaluation.per_row import kept
from smolvlm_exp.reporting.charts import MINUS, NBSP, line_chart, percent
from smolvlm_exp.reporting.html import NOTHING, page, shown, table, words
from smolvlm_exp.reporting.report import CURVES, points_of, read_events
from smolvlm_exp.reporting.tracker import track_table
from smolvlm_exp.runs.find import BESIDE, as_typed, summary_of
from smolvlm_exp.runs.sweep_record import find_sweep
from smolvlm_exp.sweep.jobs import brief, short
from smolvlm_exp.utils.errors import RequestError


def compare(config: Config, folder: Path) -> Comparison:
    """Print the table and write compare.csv and compare.html into `folder`.

    Raises:
        RequestError: fewer than two finished runs were named.
    """
    found = comparison([read(path) for path in folders(config.runs)], config.metric)
    rows = flat(found)
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "compare.html").write_text(document(found, folder), encoding="utf-8")
    show(found)
    track_table(
        config.tracker, folder, "compare", f"compare {folder.parent.name} {folder.name}", rows, {"runs": len(rows)}
    )
    print(f"{as_typed(folder)}/compare.html")
    return found


def folders(named: Sequence[str]) -> list[Path]:
    """The finished runs that folders, sweeps' folders, patterns and `last` (the newest sweep) name.

    Raises:
        RequestError: one of them names nothing, or all together fewer than two.
    """
    found: dict[Path, None] = {}
    for name in named:
        paths = [find_sweep("last")] if name == "last" else matching(name) or [Path(name)]
        runs = [run for path in paths for run in (path, *sorted(path.glob("*"))) if ended(run)]
        if not runs:
            raise RequestError(f"runs: {name} names no finished run (status done in its summary.json).")
        found |= dict.fromkeys(run.resolve() for run in runs)  # one run, however often it is named
    if len(found) < 2:
        raise RequestError("task=compare needs two finished runs or more: runs=[outputs/a,outputs/b], or runs=[last].")
    return list(found)


def matching(pattern: str) -> list[Path]:
    return [Path(found) for found in sorted(glob(str(Path(pattern).expanduser())))]


def ended(folder: Path) -> bool:
    return summary_of(folder).get("status") == "done" and (folder / ".hydra" / "config.yaml").is_file()


def read(folder: Path) -> Run:
    config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    settings = {key: str(value) for key, value in flattened(config) if key.partition(".")[0] not in BESIDE}
    return Run(folder, settings, summary_of(folder), kept(folder))


def flattened(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        return [pair for key, value in node.items() for pair in flattened(value, f"{path}.{key}" if path else str(key))]
    return [(path, OmegaConf.to_container(OmegaConf.create(node)) if isinstance(node, list) else node)]


def written(path: str, value: float | None, error: float | None) -> str:
    """A number for people, with what it may be off by."""
    if value is None:
        return ""
    share = path.startswith("after.") and METRICS[path.partition(".")[2]].share
    text, off = (
        (percent(value, 1), f" ± {100 * (error or 0):.1f}") if share else (f"{value:.3g}", f" ± {error or 0:.2g}")
    )
    return text + (off if error is not None else "")


POINTS = " points"
NAMES = {"chair_s": "CHAIR_s", "chair_i": "CHAIR_i", "cog": "Cog"}  # as the papers have them
ARROWS = {1: "↑", -1: "↓", 0: ""}
COSTS = {"train.seconds": "seconds", "train.memory_peak_gib": "GiB", "train.pairs_per_second": "pairs/s"}


def headed(path: str) -> str:
    """A column's name, with an arrow to where it is better."""
    key = path.partition(".")[2]
    return f"{NAMES.get(key, words(key))} {ARROWS[GOALS.get(path, 0)]}".strip()


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
    names = short(found.keys)
    first = found.metrics[:2]  # 80 columns hold no more
    lines = Table(*names.values(), "runs", "", *map(headed, first), *COSTS.values())
    for column in lines.columns:
        column.overflow = "fold"
    for group in found.groups:
        settings = [brief(group.settings[key]) for key in found.keys]
        numbers = [written(path, group.value(path), group.error(path)) for path in first]
        costs = [written(path, group.value(path), None) for path in COSTS]
        verdict = f"{found.verdict(group)}\n{apart(found, group).removesuffix(POINTS)}".strip()
        lines.add_row(*settings, str(len(group.runs)), verdict, *numbers, *costs)
    Console().print(lines)


def flat(found: Comparison) -> list[dict[str, Any]]:
    """A row a run, for compare.csv and W&B's table; of its group the mean and half of the 95 % interval."""
    return [
        {
            "run": str(as_typed(run.folder)),
            **group.settings,
            "seed": run.summary.get("seed"),
            **{path: run.value(path) for path in (*found.metrics, *COSTS)},
            "group": found.verdict(group),
            "from the best": found.gaps[number].difference,
            "from the best +-": found.gaps[number].noise if number else None,
            **{f"group {path}": group.value(path) for path in found.metrics},
            **{f"group {path} +-": group.error(path) for path in found.metrics},
        }
        for number, group in enumerate(found.groups)
        for run in group.runs
    ]


def document(found: Comparison, folder: Path) -> str:
    """compare.html, in `folder`: the table, and the curves of all runs over each other."""
    named = [(name_of(found, group, run), called(found, group), run) for group in found.groups for run in group.runs]
    pages = [(name, run.folder, quote(os.path.relpath(run.folder / "report.html", folder))) for name, _, run in named]
    links = "".join(
        f'<div><dt>{html.escape(name)}</dt><dd><a href="{link}">{html.escape(str(as_typed(path)))}</a></dd></div>'
        for name, path, link in pages
    )
    sections = [
        ("table", "The runs", f'<p class="hint">{html.escape(HINT)}</p>{groups_table(found)}'),
        ("curves", "Curves", curves(named)),
        ("folders", "Their reports", f'<dl class="facts">{links}</dl>'),
    ]
    header = (
        '<header><p class="eyebrow">smolvlm_exp</p><h1>Comparison</h1>'
        f'<p class="lead">{html.escape(lead(found))}</p></header>'
    )
    return page("Comparison · smolvlm_exp", header, sections)


HINT = (
    "±: half of the 95 % interval, over other held-out rows and, where a line has several seeds, over other seeds. "
    "From the best: the difference in the metric that decides; of the same held-out rows it is measured row by row, so "
    "it may be surer than the two numbers beside it. Worse: it is larger than its ±."
)


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
    names = short(found.keys)
    return " ".join(f"{names[key]}={brief(value)}" for key, value in group.settings.items())


def name_of(found: Comparison, group: Group, run: Run) -> str:
    """A run's: its group, and its seed or, where two have the same, its folder."""
    seeds = [each.summary.get("seed") for each in group.runs]
    own = f"seed={run.summary.get('seed')}" if seeds.count(run.summary.get("seed")) == 1 else str(as_typed(run.folder))
    return f"{called(found, group)} {own}".strip() if len(seeds) > 1 else called(found, group) or own


def groups_table(found: Comparison) -> str:
    paths = [*found.metrics[:3], *COSTS, *found.metrics[3:]]  # what decides is in sight before anything is scrolled
    heads = (COSTS.get(path) or headed(path) for path in paths)
    head = [*short(found.keys).values(), "Runs", "", "From the best", *heads]
    rows = []
    for group in found.groups:
        cells = [shown(brief(group.settings[key])) for key in found.keys]
        texts = [str(len(group.runs)), found.verdict(group), apart(found, group)]
        texts += [written(path, group.value(path), group.error(path)) for path in paths]
        cells += [html.escape(text).replace(" ", NBSP) or NOTHING for text in texts]
        tone = {"best": "better", "worse": "worse"}.get(found.verdict(group), "")
        verdict = len(found.keys) + 1
        cells[verdict] = f'<span class="change">{cells[verdict]}</span>'  # in the row's colour
        rows.append(f'<tr class="{tone}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return table("jobs", head, rows)


def curves(named: Sequence[tuple[str, str, Run]]) -> str:
    """One chart a quantity, one line a run, one colour a group."""
    drawn, groups = [], {name: group or name for name, group, _ in named}
    events = {name: read_events(run.folder / "metrics.jsonl") for name, _, run in named}
    for title, keys, options in CURVES:
        for kind, key in keys.items():
            series = {name: points_of(each, key) for name, each in events.items()}
            drawn.append(line_chart(series, f"{title}, {kind}" if len(keys) > 1 else title, alike=groups, **options))
    return f'<div class="charts">{"".join(drawn)}</div>'
