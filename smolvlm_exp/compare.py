"""task=compare: finished runs beside each other, from their folders alone: what differs, what came of it, what is luck.

Runs that differ in their seed alone are one line, their mean with Student's t interval; a single run has the interval
that it measured over its held-out rows. A difference counts where it is larger than both together leave to chance.
"""

import csv
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from smolvlm_exp.charts import line_chart, percent
from smolvlm_exp.config import Config
from smolvlm_exp.errors import RequestError
from smolvlm_exp.metrics import GOALS, METRICS
from smolvlm_exp.page import NOTHING, facts, finite, page, shown, table, words
from smolvlm_exp.report import CURVES, points_of, read_events
from smolvlm_exp.runs import BESIDE, as_typed
from smolvlm_exp.sweep.effects import T
from smolvlm_exp.sweep.jobs import brief, short
from smolvlm_exp.sweep.record import find_sweep, summary_of
from smolvlm_exp.tracking import track_table

NORMAL = 1.96  # standard errors, for 95 %


@dataclass(frozen=True)
class Run:
    folder: Path
    settings: dict[str, str]  # the whole resolved configuration, flat, as text
    summary: dict[str, Any]

    def value(self, path: str) -> float | None:
        part, _, key = path.partition(".")
        return finite((self.summary.get(part) or {}).get(key))


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    settings: dict[str, str]  # what tells the group from the others
    runs: list[Run]

    def value(self, path: str) -> float | None:
        found = [value for run in self.runs if (value := run.value(path)) is not None]
        return mean(found) if found else None

    def error(self, path: str) -> float | None:
        """Half of the 95 % interval; None where none is known."""
        found = [value for run in self.runs if (value := run.value(path)) is not None]
        if len(found) > 1:
            return T[min(len(found) - 1, len(T)) - 1] * stdev(found) / len(found) ** 0.5
        ends = self.runs[0].summary.get("intervals", {}).get("after", {}).get(path.partition(".")[2])
        return (ends[1] - ends[0]) / 2 if ends and path.startswith("after.") else None


@dataclass(frozen=True)
class Comparison:
    groups: list[Group]  # the best first
    keys: list[str]  # the settings that differ, seed apart
    metric: str

    @property
    def metrics(self) -> list[str]:
        """What all evaluations have in common, the one that decides first."""
        names = [f"after.{name}" for name in METRICS if all(g.value(f"after.{name}") is not None for g in self.groups)]
        return list(dict.fromkeys([self.metric, *names]))

    def verdict(self, group: Group) -> str:
        """How a group stands to the best."""
        best, metric = self.groups[0], self.metric
        if group is best:
            return "best"
        gap = abs((best.value(metric) or 0.0) - (group.value(metric) or 0.0))
        errors = best.error(metric), group.error(metric)
        if None in errors:
            return "worse, or luck: it has no interval"
        noise = sum((error or 0.0) ** 2 for error in errors) ** 0.5
        return "worse" if gap > noise else "within the noise"


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
    (folder / "compare.html").write_text(document(found), encoding="utf-8")
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
        paths = [find_sweep("last")] if name == "last" else sorted(Path().glob(name)) if "*" in name else [Path(name)]
        runs = [run for path in paths for run in (path, *sorted(path.glob("*"))) if ended(run)]
        if not runs:
            raise RequestError(f"runs: {name} names no finished run (status done in its summary.json).")
        found |= dict.fromkeys(runs)
    if len(found) < 2:
        raise RequestError("task=compare needs two finished runs or more: runs=[outputs/a,outputs/b], or runs=[last].")
    return list(found)


def ended(folder: Path) -> bool:
    return summary_of(folder).get("status") == "done" and (folder / ".hydra" / "config.yaml").is_file()


def read(folder: Path) -> Run:
    config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    settings = {key: str(value) for key, value in flattened(config) if key.partition(".")[0] not in BESIDE}
    return Run(folder, settings, summary_of(folder))


def flattened(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        return [pair for key, value in node.items() for pair in flattened(value, f"{path}.{key}" if path else str(key))]
    return [(path, OmegaConf.to_container(OmegaConf.create(node)) if isinstance(node, list) else node)]


def comparison(runs: Sequence[Run], metric: str) -> Comparison:
    """Group by what differs beside the seed, the best first."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = [key for key in keys if len({run.settings.get(key, "") for run in runs}) > 1]
    grouped: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        grouped.setdefault(tuple(run.settings.get(key, "") for key in differing), []).append(run)
    groups = [Group(dict(zip(differing, values, strict=True)), members) for values, members in grouped.items()]
    worst = -GOALS[metric] * float("inf")
    groups.sort(key=lambda g: -GOALS[metric] * (worst if g.value(metric) is None else g.value(metric) or 0.0))
    return Comparison(groups, differing, metric)


def written(path: str, value: float | None, error: float | None) -> str:
    """A number for people, with what it may be off by."""
    if value is None:
        return ""
    share = path.startswith("after.") and METRICS[path.partition(".")[2]].share
    text, off = (
        (percent(value, 1), f" ± {100 * (error or 0):.1f}") if share else (f"{value:.3g}", f" ± {error or 0:.2g}")
    )
    return text + (off if error is not None else "")


COSTS = {"train.seconds": "seconds", "train.memory_peak_gib": "GiB", "train.pairs_per_second": "pairs/s"}


def show(found: Comparison) -> None:
    names = short(found.keys)
    first = found.metrics[:2]  # 80 columns hold no more
    lines = Table(*names.values(), "runs", "", *(words(path.partition(".")[2]) for path in first), *COSTS.values())
    for column in lines.columns:
        column.overflow = "fold"
    for group in found.groups:
        settings = [brief(group.settings[key]) for key in found.keys]
        numbers = [written(path, group.value(path), group.error(path)) for path in first]
        costs = [written(path, group.value(path), None) for path in COSTS]
        lines.add_row(*settings, str(len(group.runs)), found.verdict(group), *numbers, *costs)
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
            **{f"group {path}": group.value(path) for path in found.metrics},
            **{f"group {path} +-": group.error(path) for path in found.metrics},
        }
        for group in found.groups
        for run in group.runs
    ]


def document(found: Comparison) -> str:
    """compare.html: the table, and the curves of all runs over each other."""
    runs = [(label(found, group, run), run) for group in found.groups for run in group.runs]
    sections = [
        ("table", "The runs", groups_table(found)),
        ("curves", "Curves", curves(runs)),
        ("folders", "Where they are", facts((name, str(as_typed(run.folder))) for name, run in runs)),
    ]
    lead = f"{len(runs)} runs, compared by {words(found.metric.partition('.')[2])}."
    header = (
        f'<header><p class="eyebrow">smolvlm_exp</p><h1>Comparison</h1><p class="lead">{html.escape(lead)}</p></header>'
    )
    return page("Comparison · smolvlm_exp", header, sections)


def label(found: Comparison, group: Group, run: Run) -> str:
    names = short(found.keys)
    told = " ".join(f"{names[key]}={brief(value)}" for key, value in group.settings.items())
    return f"{told} seed={run.summary.get('seed')}".strip() if len(group.runs) > 1 else told or str(run.folder)


def groups_table(found: Comparison) -> str:
    paths = [*found.metrics[:3], *COSTS, *found.metrics[3:]]  # what decides is in sight before anything is scrolled
    head = [*short(found.keys).values(), "Runs", "", *(words(path.partition(".")[2]) for path in paths)]
    rows = []
    for group in found.groups:
        cells = [shown(brief(group.settings[key])) for key in found.keys]
        cells += [str(len(group.runs)), html.escape(found.verdict(group))]
        cells += [html.escape(written(path, group.value(path), group.error(path))) or NOTHING for path in paths]
        tone = "better" if found.verdict(group) != "worse" else ""
        rows.append(f'<tr class="{tone}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return table("jobs", head, rows)


def curves(runs: Sequence[tuple[str, Run]]) -> str:
    """One chart a quantity, one line a run."""
    drawn = []
    events = {name: read_events(run.folder / "metrics.jsonl") for name, run in runs}
    for title, keys, options in CURVES:
        for kind, key in keys.items():
            series = {name: points_of(each, key) for name, each in events.items()}
            drawn.append(line_chart(series, f"{title}, {kind}" if len(keys) > 1 else title, **options))
    return f'<div class="charts">{"".join(drawn)}</div>'
