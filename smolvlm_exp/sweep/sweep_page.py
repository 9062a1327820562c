"""`sweep.html`: the best run, what each setting does, quality vs. cost, and all jobs (templates/sweep.html.jinja)."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.evaluation.metrics import GOALS, is_share, metric_of
from smolvlm_exp.evaluation.verdict import too_few
from smolvlm_exp.reporting.charts import bar_chart, line_chart, scatter_chart
from smolvlm_exp.reporting.html import render
from smolvlm_exp.runs.sweep_record import job_label
from smolvlm_exp.sweep.results import COSTS, RUNNING, JobResult, SweepResults, main_effects
from smolvlm_exp.utils.files import write_text
from smolvlm_exp.utils.formatting import duration, humanize, number, percent, short_keys, short_value

if TYPE_CHECKING:
    from optuna import Study

COST_LABELS = {"train.seconds": "training time, s", "train.memory_peak_gib": "peak memory, GiB"}


def write_page(results: SweepResults, study: "Study | None" = None) -> Path:
    """Write sweep.html into the sweep's folder; `study`: the search's, in place of main effects."""
    part, _, key = results.metric.partition(".")
    label = metric_of(key).label if part == "after" else humanize(key)
    show: Callable[[float], str] = partial(percent, decimals=1) if is_share(results.metric) else number
    best, statuses = results.best, [job.status for job in results.jobs]
    effects = {} if study else main_effects(results)
    page = render(
        "sweep.html.jinja",
        heading="/".join(results.folder.absolute().parts[-2:]),
        lead=lead(results, label, show),
        status=next(
            (status for status in ("failed", RUNNING) if status in statuses), "stopped" if results.failed() else "done"
        ),
        statuses=statuses,
        about=[
            *((status, statuses.count(status)) for status in dict.fromkeys(statuses)),
            ("compared by", label),
            ("held-out rows", best.summary.get("held_out_rows") if best else None),
            ("total training time", duration(sum(job.value("train.seconds") or 0.0 for job in results.jobs))),
        ],
        results=results,
        best=best,
        front=results.front,
        label=label,
        show=lambda value: None if value is None else show(value),
        short_value=short_value,
        effects=effects,
        seeds=max((effect.seeds for group in effects.values() for effect in group), default=0),
        goal=GOALS[results.metric],
        search=None if study is None else study_section(study, label, show),
        cost_charts=[cost_chart(results, cost, label, show) for cost in COSTS] if best else [],
        head=["Job", "Status", *short_keys(results.keys).values(), label, "Seconds", "GiB", "Notes"],
        costs=COSTS,
    )
    path = results.folder / "sweep.html"
    write_text(path, page)
    return path


def lead(results: SweepResults, label: str, show: Callable[[float], str]) -> str:
    best = results.best
    if best is None:
        return "No job has finished."
    worst = min(results.done, key=results.score)
    span = f"{show(results.measured(worst))} to {show(results.measured(best))}"
    if too_few(best.summary.get("held_out_rows")):
        return f"{results.verdict}."
    said = f" {results.verdict[0].upper()}{results.verdict[1:]}." if results.verdict else ""
    return f"{label}: {span}; best with {settings_label(results, best)}.{said}"


def settings_label(results: SweepResults, job: JobResult) -> str:
    return job_label(job, results.keys) or f"job {job.number}"


def cost_chart(results: SweepResults, cost: str, label: str, show: Callable[[float], str]) -> str:
    front = results.front
    points = [
        (x, results.measured(job), f"job {job.number}: {settings_label(results, job)}", job in front)
        for job in results.done
        if (x := job.value(cost)) is not None
    ]
    return scatter_chart(points, f"{label} vs. {COST_LABELS[cost]}", x_label=COST_LABELS[cost], show=show)


def study_section(study: "Study", label: str, show: Callable[[float], str]) -> dict[str, Any]:
    """How many trials ended which way; their history and each setting's importance, where enough have finished."""
    states = [trial.state.name for trial in study.trials]
    values = [(t.number, t.value) for t in study.trials if t.state.name == "COMPLETE" and t.value is not None]
    section: dict[str, Any] = {"complete": len(values), "pruned": states.count("PRUNED"), "charts": []}
    if len(values) >= 2:
        better = max if study.direction.name == "MAXIMIZE" else min
        best = [(number, better(value for _, value in values[: i + 1])) for i, (number, _) in enumerate(values)]
        history = line_chart({"trial": values, "best so far": best}, label, x_label="trial", show=show)
        section["charts"] = [bar_chart(importance(study), "Importance of each setting"), history]
    return section


def importance(study: "Study") -> dict[str, float]:
    """Setting -> its share in what separates good trials from others (PED-ANOVA); the shares add up to 1."""
    from optuna.importance import get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where trials with equal values make all settings equal
        return get_param_importances(study)
