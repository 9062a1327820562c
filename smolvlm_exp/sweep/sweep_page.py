"""`sweep.html`: one file that says which run is best, what each setting does, and what quality costs.

It has the look of a run's report (page.py) and, like it, needs no network, account or script.
"""

import html
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.evaluation.metrics import GOALS, METRICS
from smolvlm_exp.reporting.charts import bar_chart, line_chart, scatter_chart
from smolvlm_exp.reporting.html import NOTHING, definition_list, empty, format_value, page, status_pill, table
from smolvlm_exp.runs.sweep_record import job_label
from smolvlm_exp.sweep.effects import Effect, main_effects
from smolvlm_exp.sweep.results import COSTS, JobResult, SweepResults, job_command
from smolvlm_exp.utils.formatting import duration, humanize, number, percent, short_keys, short_value
from smolvlm_exp.utils.paths import relative_to_cwd

if TYPE_CHECKING:
    from optuna import Study


Sections = Sequence[tuple[str, str, str]]  # (anchor, title, HTML)
COST_NAMES = {"train.seconds": "seconds of training", "train.memory_peak_gib": "peak memory, GiB"}


def write_page(found: SweepResults, middle: Sections = ()) -> Path:
    """Write sweep.html into the sweep's folder; whatever is missing says so in its place.

    Args:
        middle: what stands in place of the main effects, where the settings are no grid.
    """
    name, show = title_of(found.metric), shower(found.metric)
    sections = [
        ("best", "The best run", best_of(found, show)),
        *(middle or [("effects", "What each setting does", effects_of(found, name, show))]),
        ("costs", "Quality beside time and memory", costs_of(found, name, show)),
        ("jobs", "All jobs", jobs_of(found, name, show)),
        ("again", "Go on", again_of(found)),
    ]
    where = "/".join(found.folder.absolute().parts[-2:])
    path = found.folder / "sweep.html"
    document = page(f"Sweep {where} · smolvlm_exp", header_of(found, where, name, show), sections)
    path.write_text(document, encoding="utf-8")
    return path


def title_of(metric: str) -> str:
    """A metric's name for people."""
    part, _, key = metric.partition(".")
    return METRICS[key].label if part == "after" else humanize(key)


def shower(metric: str) -> Callable[[float], str]:
    """How the metric's values are written."""
    part, _, key = metric.partition(".")
    if part == "after" and METRICS[key].share:
        return lambda value: percent(value, 1)
    return number


def header_of(found: SweepResults, where: str, name: str, show: Callable[[float], str]) -> str:
    statuses = [row.status for row in found.rows]
    done, best = statuses.count("done"), found.best
    lead = "No job has finished."
    if best:
        worst = min(found.done, key=found.goodness)
        span = f"{show(found.measured(worst))} to {show(found.measured(best))}"
        lead = f"{name}: {span}, the best with {differs(found, best)}."
    told = [(status, statuses.count(status)) for status in dict.fromkeys(statuses)]
    seconds = sum(row.value("train.seconds") or 0.0 for row in found.rows)
    told += [("compared by", found.metric), ("training in all", duration(seconds))]  # type: ignore[list-item]
    state = "failed" if "failed" in statuses else "done" if not found.failed else "stopped"
    return (
        f'<header><p class="eyebrow">smolvlm_exp sweep</p><h1>{html.escape(where)}</h1>'
        f'<p class="state">{status_pill(state)} {done} of {len(statuses)} jobs done</p>'
        f'<p class="lead">{html.escape(lead)}</p>{definition_list(told)}</header>'
    )


def differs(found: SweepResults, row: JobResult) -> str:
    return job_label(row.job, found.keys) or f"job {row.job.number}"


def best_of(found: SweepResults, show: Callable[[float], str]) -> str:
    best = found.best
    if best is None:
        return empty("No job has finished.")
    ties = sum(found.measured(row) == found.measured(best) for row in found.done) - 1
    told: list[tuple[str, Any]] = [
        ("job", best.job.number),
        *((key, short_value(best.job.settings.get(key, ""))) for key in found.keys),
    ]
    told.append((found.metric, show(found.measured(best))))
    notes = [f"{ties} more as good; this one came first."] if ties else []
    if len(found.varied) < len(found.keys):
        notes.append("The best of several seeds is partly luck: see below what holds over all of them.")
    return (
        f"{definition_list(told)}{paragraph(' '.join(notes))}{paragraph('Run it again, alone')}"
        f'<pre class="command">{html.escape(job_command(best.job))}</pre>'
    )


def paragraph(text: str) -> str:
    return f'<p class="hint">{html.escape(text)}</p>' if text else ""


def effects_of(found: SweepResults, name: str, show: Callable[[float], str]) -> str:
    """A table a setting; means over the other settings, intervals over seeds."""
    effects = main_effects(found)
    if not any(effects.values()):
        return empty("There are not enough finished runs to compare settings.")
    seeds = max(effect.seeds for group in effects.values() for effect in group)
    hint = f"{name}, the mean over all other settings" + (
        f", with 95 % intervals over {seeds} seeds (Student's t)."
        if seeds > 1
        else ". One seed: how much of a difference is chance is not known; add seed=0,1,2 to see."
    )
    best = GOALS[found.metric]
    rows = [row for key, group in effects.items() for row in effect_rows(key, group, best, show)]
    head = ["Setting", "Value", name, "95 % interval", "Seeds", "Runs"]
    return paragraph(hint) + table("effects", head, rows)


def effect_rows(key: str, group: list[Effect], goal: int, show: Callable[[float], str]) -> list[str]:
    if not group:
        return [
            f'<tr><th scope="row">{html.escape(key)}</th><td colspan="5">{empty("not enough finished runs")}</td></tr>'
        ]
    top = max(effect.mean * goal for effect in group)
    return [
        f'<tr class="{"better" if effect.mean * goal == top else ""}">'
        f'<th scope="row">{html.escape(key) if i == 0 else ""}</th>'
        f'<td>{html.escape(effect.value)}</td><td class="change">{show(effect.mean)}</td>'
        f"<td>{NOTHING if effect.interval is None else f'± {show(effect.interval)}'}</td>"
        f"<td>{effect.seeds}</td><td>{effect.runs}</td></tr>"
        for i, effect in enumerate(group)
    ]


def costs_of(found: SweepResults, name: str, show: Callable[[float], str]) -> str:
    """A point a run; those that nothing beats in all three are filled."""
    front = found.front
    if not front:
        return empty("No job has finished.")
    charts = []
    for cost, cost_name in COST_NAMES.items():
        points = [
            (x, found.measured(row), f"job {row.job.number}: {differs(found, row)}", row in front)
            for row in found.done
            if (x := row.value(cost)) is not None
        ]
        charts.append(scatter_chart(points, f"{name} over {cost_name}", x_label=cost_name, show=show))
    hint = (
        f"Filled: the {len(front)} runs that no other equals or beats in all three of metric, time and memory "
        "(the Pareto front). Hover to see which is which."
    )
    return paragraph(hint) + f'<div class="charts">{"".join(charts)}</div>'


def jobs_of(found: SweepResults, name: str, show: Callable[[float], str]) -> str:
    front, best = found.front, found.best
    rows = []
    for row in found.rows:
        value = row.value(found.metric)
        step = row.value("train.resumed_at")
        notes = ["best"] * (row is best) + ["Pareto front"] * (row in front) + [row.reason] * bool(row.reason)
        notes += [f"time since step {step:.0f}"] if step is not None else []
        cells = [
            status_pill(row.status),
            *(format_value(short_value(row.job.settings.get(key, ""))) for key in found.keys),
            NOTHING if value is None else show(value),
            *(format_value(row.value(cost)) for cost in COSTS),
            html.escape(", ".join(notes)),
        ]
        number_cell = f'<a href="{row.job.number}/report.html">{row.job.number}</a>'
        rows.append(f'<tr><th scope="row">{number_cell}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    head = ["Job", "State", *short_keys(found.keys).values(), name, "Seconds", "GiB", ""]
    return table("jobs", head, rows)


def again_of(found: SweepResults) -> str:
    line = f"python -m smolvlm_exp -m sweep={relative_to_cwd(found.folder)}"
    text = "Runs what is missing or failed, goes on with what was cut, and leaves what is done."
    return f'{paragraph(text)}<pre class="command">{html.escape(line)}</pre>'


def study_sections(study: "Study", metric: str) -> Sections:
    """Importance (PED-ANOVA, Optuna's default) and history, where enough trials are done."""
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE" and trial.value is not None]
    if len(done) < 2:
        return [("search", "The search", empty("Fewer than two trials are done."))]
    name, better = title_of(metric), max if study.direction.name == "MAXIMIZE" else min
    values = [(trial.number, trial.value) for trial in done if trial.value is not None]
    best = [(number, better(value for _, value in values[: i + 1])) for i, (number, _) in enumerate(values)]
    history = line_chart({"trial": values, "best so far": best}, name, x_label="trial", show=shower(metric))
    pruned = sum(trial.state.name == "PRUNED" for trial in study.trials)
    hint = f"{len(done)} trials ran to their end, {pruned} were pruned."
    charts = f'<div class="charts">{bar_chart(importance(study), "Importance of each setting")}{history}</div>'
    return [("search", "The search", paragraph(hint) + charts)]


def importance(study: "Study") -> dict[str, float]:
    """Setting -> its share in what tells good trials from others; the shares add up to 1."""
    from optuna.importance import get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that trials which are all alike make all settings alike
        return get_param_importances(study)
