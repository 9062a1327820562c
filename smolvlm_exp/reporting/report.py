"""A run folder -> `report.html`: one file that shows what a run did, without a network, an account or a script.

Python computes what is shown; `templates/report.html.jinja` lays it out.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from smolvlm_exp.reporting.charts import line_chart
from smolvlm_exp.reporting.html import render
from smolvlm_exp.reporting.results import headline, result_rows
from smolvlm_exp.runs.event_log import metric_points, read_events
from smolvlm_exp.utils.files import write_text
from smolvlm_exp.utils.formatting import duration, number, percent
from smolvlm_exp.utils.hub import Provenance
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.phases import PHASES

if TYPE_CHECKING:
    from smolvlm_exp.reporting.sampled_answers import SampledGroup
    from smolvlm_exp.reporting.summary import Sample  # which imports torch; task=compare does without

Curves = list[tuple[str, dict[str, str], dict[str, Any]]]  # title, {name: key of metrics.jsonl}, how to draw

SHARE: dict[str, Any] = {"show": percent, "bounds": (0.0, 1.0)}
CURVES: Curves = [
    ("Loss", {"training": "loss", "held-out": "eval_loss"}, {}),
    ("Reward of sampled answers", {"mean": "reward", "held-out": "eval_reward"}, {}),
    ("Groups whose answers all earn the same", {"share": "frac_reward_zero_std"}, SHARE),
    (
        "Length of sampled answers, tokens",
        {"mean": "completions/mean_length", "longest": "completions/max_length"},
        {"zero": True},
    ),
    ("Sampled answers that were cut", {"share": "completions/clipped_ratio"}, SHARE),
    ("KL divergence from the reference", {"KL": "kl"}, {}),
    ("Entropy of sampled answers, nats/token", {"entropy": "entropy"}, {}),
    ("Rewards", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}, {}),
    (
        "Reward accuracy",
        {"training": "rewards/accuracies", "held-out": "eval_rewards/accuracies"},
        {**SHARE, "reference": ("chance", 0.5)},
    ),
    ("Reward margin", {"training": "rewards/margins", "held-out": "eval_rewards/margins"}, {}),
    ("Log-probs of the answers", {"chosen": "logps/chosen", "rejected": "logps/rejected"}, {}),
    ("Token accuracy", {"training": "mean_token_accuracy", "held-out": "eval_mean_token_accuracy"}, SHARE),
    ("Gradient norm", {"norm": "grad_norm"}, {"zero": True}),
    ("Learning rate", {"rate": "learning_rate"}, {"zero": True}),
    ("Pairs/s", {"pairs": "pairs_per_second"}, {"zero": True}),
    ("Tokens/s", {"tokens": "tokens_per_second"}, {"zero": True}),
    ("Peak memory, GiB", {"peak": "memory_peak_gib"}, {"zero": True}),
]


def write_report(
    folder: Path,
    summary: dict[str, Any],
    config: dict[str, Any],
    samples: "Sequence[Sample]",
    histories: "Sequence[Sample]" = (),
    groups: "Sequence[SampledGroup]" = (),
) -> None:
    """Write `folder/report.html` from what the run measured.

    Args:
        folder: the run folder; its metrics.jsonl is read.
        summary: what summary.json holds; a stopped run's has no `after`, task=evaluate's no `train`.
        samples: with the answers before and after training; histories: with those during it.
        groups: of answers that the model was trained on.
    """
    train = summary.get("train", {})
    facts = {
        **{f"{name} from": Provenance(**source) for name, source in summary.get("sources", {}).items()},
        "seed": summary["seed"],
        "held-out rows": summary.get("held_out_rows"),
        "steps": train.get("steps"),
        "time": duration(train["seconds"]) if train else None,
    }
    text = render(
        "report.html.jinja",
        heading=config.get("name") or "/".join(folder.absolute().parts[-2:]),
        lead=headline(summary),
        status=summary["status"],
        checked=count_passed([check["verdict"] for check in summary["checks"]]),
        about={**summary.get("settings", {}), **facts}.items(),
        results=result_rows(summary["before"], summary["after"], summary.get("changes", {})),
        checks=summary["checks"],
        advice=summary.get("advice", []),
        curves=draw_curves(read_events(folder / "metrics.jsonl")),
        samples=[sample.card() for sample in samples],
        marked=any(words for sample in samples for words in sample.hallucinated.values()),
        histories=[sample.card() for sample in histories],
        groups=[group.card() for group in groups],
        speed=summary.get("speed"),
        train=train_facts(train) if train else (),
        phases=phase_facts(summary.get("seconds_by_phase", {})),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100),
        versions=summary["versions"],
        commands=reproduce_commands(folder, summary["status"]),
    )
    write_text(folder / "report.html", text)


def count_passed(verdicts: list[str]) -> str:
    if not verdicts:
        return ""
    failed, count = verdicts.count("fail"), len(verdicts)
    return f"{failed} of {count} checks failed" if failed else f"{verdicts.count('ok')} of {count} checks passed"


def draw_curves(events: list[dict[str, Any]]) -> list[str]:
    means = {m.group(1): key for event in events for key in event if (m := re.fullmatch(r"rewards/(\w+)/mean", key))}
    curves = [*CURVES, ("Each reward", means, {})] if means else CURVES
    charts = [
        line_chart({name: metric_points(events, key) for name, key in keys.items()}, title, **options)
        for title, keys, options in curves
    ]
    return [chart for chart in charts if chart]


def train_facts(train: dict[str, Any]) -> list[tuple[str, Any]]:
    trainable, total = train["trainable_parameters"], train["total_parameters"]
    return [
        ("steps", train["steps"]),
        ("time", duration(train["seconds"])),
        ("pairs/s", float(train["pairs_per_second"])),
        ("peak memory", f"{number(train['memory_peak_gib'])} GiB"),
        ("first loss", train["first_loss"]),
        ("last loss", train["last_loss"]),
        ("trainable parameters", f"{trainable:,} of {total:,} ({percent(trainable / total, 2)})"),
    ]


def phase_facts(seconds: dict[str, float]) -> list[tuple[str, str]]:
    total = sum(seconds.values())
    return [(PHASES[name], f"{duration(taken)} ({percent(taken / total)})") for name, taken in seconds.items()]


def reproduce_commands(folder: Path, status: str) -> list[tuple[str, str]]:
    run, command = str(relative_to_cwd(folder)), "python -m smolvlm_exp"
    replay = f"{command} --config-path {shlex.quote(f'{run}/.hydra')} --config-name config"
    resume = f"{command} resume={shlex.quote(run)}"
    return [("Run it again", replay), *([("Resume from its last checkpoint", resume)] if status != "done" else [])]
