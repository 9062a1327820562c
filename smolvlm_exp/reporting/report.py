"""A run folder -> `report.html`: one file that shows what a run did, without a network, an account or a script.

    write_report(folder, summary, config, samples)

Anything may be missing: a run that failed early still gets its page. The parts are next door: `charts` draws, `metrics`
is the before/after table, `cards` shows rows, `page` is what surrounds them.
"""

import html
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from smolvlm_exp.evaluation.metrics import METRICS
from smolvlm_exp.reporting.charts import line_chart
from smolvlm_exp.reporting.html import definition_list, empty, format_value, page, status_pill, table
from smolvlm_exp.reporting.metrics_table import results
from smolvlm_exp.reporting.samples import Sample, SampleHistory, history_cards, sample_cards
from smolvlm_exp.runs.event_log import metric_points, read_events
from smolvlm_exp.utils.formatting import as_finite, as_float, duration, humanize, number, percent
from smolvlm_exp.utils.paths import relative_to_cwd

Curves = list[tuple[str, dict[str, str], dict[str, Any]]]  # title, {name: key of metrics.jsonl}, how to draw

HEADLINE = ("chair_s", "preference_accuracy", "yes_no_accuracy", "recall", "reward_accuracy")

CURVES: Curves = [
    ("Loss", {"training": "loss", "held-out": "eval_loss"}, {}),
    ("Rewards", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}, {}),
    (
        "Reward accuracy",
        {"training": "rewards/accuracies", "held-out": "eval_rewards/accuracies"},
        {"show": percent, "bounds": (0.0, 1.0), "reference": ("chance", 0.5)},
    ),
    ("Reward margin", {"training": "rewards/margins", "held-out": "eval_rewards/margins"}, {}),
    ("Log-probability of the answers", {"chosen": "logps/chosen", "rejected": "logps/rejected"}, {}),
    (
        "Token accuracy",
        {"training": "mean_token_accuracy", "held-out": "eval_mean_token_accuracy"},
        {"show": percent, "bounds": (0.0, 1.0)},
    ),
    ("Gradient norm", {"norm": "grad_norm"}, {"zero": True}),
    ("Learning rate", {"rate": "learning_rate"}, {"zero": True}),
    ("Pairs per second", {"pairs": "pairs_per_second"}, {"zero": True}),
    ("Tokens per second", {"tokens": "tokens_per_second"}, {"zero": True}),
    ("Peak memory, GiB", {"peak": "memory_peak_gib"}, {"zero": True}),
]


def write_report(
    folder: Path,
    summary: dict[str, Any],
    config: dict[str, Any],
    samples: list[Sample],
    courses: Sequence[SampleHistory] = (),
) -> Path:
    """Write `folder/report.html` from what the run measured; anything may be missing.

    Args:
        folder: the run folder; its metrics.jsonl is read. The commands in the report name it as given.
        summary: what summary.json holds.
        config: the whole resolved config.
        samples: held-out rows with the answers before and after.
        courses: others with the answers in between.
    """
    folder = Path(folder)
    events = read_events(folder / "metrics.jsonl")
    sections = [
        ("results", "Before and after", results(*(_dict(summary, key) for key in ("before", "after", "changes")))),
        ("checks", "Checks", _checks(summary.get("checks") or []) + _advice(summary.get("advice") or [])),
        ("curves", "Curves", _charts(CURVES, events)),
        ("samples", "Samples", sample_cards(samples)),
        *([("course", "As it was tuned", history_cards(courses))] if courses else []),
        ("speed", "Memory and speed", _speeds(_dict(summary, "speed")) or _train_facts(_dict(summary, "train"))),
        ("config", "Config", _config(config)),
        ("versions", "Versions", definition_list(_dict(summary, "versions").items())),
        ("replay", "Run it again", _commands(folder, summary.get("status"))),
    ]
    name = str(config.get("name") or "/".join(folder.absolute().parts[-2:]))
    path = folder / "report.html"
    document = page(f"{name} · smolvlm_exp", _header(name, summary), sections)
    path.write_text(document, encoding="utf-8", errors="replace")
    return path


def headline(summary: dict[str, Any]) -> str:
    """One plain sentence that says what happened, from whatever was measured."""
    before, after, train = (_dict(summary, key) for key in ("before", "after", "train"))
    both, alone = [], []
    for key in HEADLINE:
        a, b = as_finite(before.get(key)), as_finite(after.get(key))
        if a is not None and b is not None:
            both.append(f"{METRICS[key].label}: {percent(a)} → {percent(b)}")
        elif b is not None:
            alone.append(f"{METRICS[key].label}: {percent(b)}")
    parts = (both or alone)[:2]
    first, last = as_float(train.get("first_loss")), as_float(train.get("last_loss"))
    if not parts and first is not None and last is not None:
        parts = [f"Training loss: {number(first)} → {number(last)}"]
    sentence = "; ".join([*parts[:1], *(p[0].lower() + p[1:] for p in parts[1:])])
    start = {"failed": "The run failed before its end.", "stopped": "The run was stopped before its end."}
    sentence = f"{sentence}." if sentence else "Nothing was measured."
    return f"{start.get(str(summary.get('status')), '')} {sentence}".strip()


def _header(name: str, summary: dict[str, Any]) -> str:
    status = str(summary.get("status") or "unknown")
    verdicts = [str(c.get("verdict")) for c in summary.get("checks") or [] if isinstance(c, dict)]
    settings = _dict(summary, "settings")
    train = _dict(summary, "train")
    told = [*settings.items(), ("seed", summary.get("seed")), ("steps", train.get("steps"))]
    if (seconds := as_finite(train.get("seconds"))) is not None:
        told.append(("time", duration(seconds)))
    passed = ""
    if verdicts:
        failed, count = verdicts.count("fail"), len(verdicts)
        passed = f"{failed} of {count} checks failed" if failed else f"{verdicts.count('ok')} of {count} checks passed"
        passed = f'<a class="passed" href="#checks">{passed}</a>'
    return (
        f'<header><p class="eyebrow">smolvlm_exp run</p><h1>{html.escape(name)}</h1>'
        f'<p class="state">{status_pill(status)}{passed}</p>'
        f'<p class="lead">{html.escape(headline(summary))}</p>{definition_list(told)}</header>'
    )


def _checks(checks: Iterable[Any]) -> str:
    rows = [
        f"<tr><td>{status_pill(str(c.get('verdict') or 'unknown'))}</td>"
        f'<th scope="row">{html.escape(humanize(c.get("name")))}{_detail(c.get("detail"))}</th>'
        f"<td>{format_value(c.get('value'))}</td><td>{format_value(c.get('threshold'))}</td></tr>"
        for c in checks
        if isinstance(c, dict)
    ]
    if not rows:
        return empty("No checks were part of this run.")
    return table("checks", ["Verdict", "Check", "Value", "Threshold"], rows)


def _advice(told: Iterable[Any]) -> str:
    return "".join(f'<p class="advice">{html.escape(str(each))}</p>' for each in told)


def _detail(text: Any) -> str:
    return f"<small>{html.escape(humanize(text))}</small>" if text else ""


def _charts(curves: Curves, events: list[dict[str, Any]]) -> str:
    drawn = []
    for title, keys, options in curves:
        series = {name: metric_points(events, key) for name, key in keys.items()}
        drawn.append(line_chart(series, title, **options))
    if any(drawn):
        return f'<div class="charts">{"".join(drawn)}</div>'
    return empty("No training log was written.")


def _train_facts(train: dict[str, Any]) -> str:
    how: dict[str, tuple[str, Callable[[float], str]]] = {
        "steps": ("steps", number),
        "seconds": ("time", duration),
        "pairs_per_second": ("pairs per second", number),
        "memory_peak_gib": ("peak memory", lambda value: f"{number(value)} GiB"),
        "first_loss": ("first loss", number),
        "last_loss": ("last loss", number),
    }
    told: list[tuple[str, Any]] = []
    for key, (label, show) in how.items():
        value = as_finite(train.get(key))
        told.append((label, train.get(key) if value is None else show(value)))
    trainable, total = as_finite(train.get("trainable_parameters")), as_finite(train.get("total_parameters"))
    if trainable is not None:
        share = f" of {total:,.0f} ({percent(trainable / total, 2)})" if total else ""
        told.append(("trainable parameters", f"{trainable:,.0f}{share}"))
    return definition_list(told)


def _speeds(speed: dict[str, Any]) -> str:
    """What task=evaluate measured of generation; empty where it did not."""
    rows = [
        f'<tr><th scope="row">{html.escape(name)}</th><td>{format_value(each.get("batch_size"))}</td>'
        f"<td>{format_value(as_finite(each.get('first_token')))}</td><td>{format_value(as_finite(each.get('tokens_per_second')))}</td>"
        f"<td>{format_value(as_finite(each.get('memory_peak_gib')))}</td></tr>"
        for name, measured in speed.items()
        for each in measured
    ]
    head = ["Model", "Answers at a time", "Seconds to the first token", "Tokens a second", "Peak GPU memory, GiB"]
    return table("speed", head, rows) if rows else ""


def _config(config: dict[str, Any]) -> str:
    text = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return f"<details><summary>The resolved config</summary><pre>{html.escape(text)}</pre></details>"


class _Dumper(yaml.SafeDumper):
    """Writes what YAML has no type for, a path for example, as text."""


_Dumper.add_multi_representer(object, lambda dumper, value: dumper.represent_str(str(value)))


def _commands(folder: Path, status: Any) -> str:
    run = relative_to_cwd(folder)
    start = "python -m smolvlm_exp"
    commands = [("Replay it", f"{start} --config-path {shlex.quote(f'{run}/.hydra')} --config-name config")]
    if status != "done":
        commands.append(("Go on from its last checkpoint", f"{start} resume={shlex.quote(str(run))}"))
    return "".join(
        f'<p class="hint">{label}</p><pre class="command">{html.escape(line)}</pre>' for label, line in commands
    )


def _dict(summary: dict[str, Any], key: str) -> dict[str, Any]:
    value = summary.get(key)
    return value if isinstance(value, dict) else {}
