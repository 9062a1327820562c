"""A run folder -> `report.html`: one file that shows what a run did, without a network or an account.

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
from smolvlm_exp.utils.formatting import duration, humanize, number, percent
from smolvlm_exp.utils.hub import Provenance
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.phases import PHASES

if TYPE_CHECKING:
    from smolvlm_exp.reporting.sampled_answers import SampledGroup
    from smolvlm_exp.reporting.summary import Sample  # which imports torch; task=compare does without

Curves = list[tuple[str, dict[str, str], dict[str, Any]]]  # title, {name: key of metrics.jsonl}, how to draw

SHARE: dict[str, Any] = {"show": percent, "bounds": (0.0, 1.0)}
CURVES: dict[str, Curves] = {
    "What the model learns": [
        ("Loss", {"training": "loss", "held-out": "eval_loss"}, {}),
        (
            "Reward accuracy",
            {"training": "rewards/accuracies", "held-out": "eval_rewards/accuracies"},
            {**SHARE, "reference": ("chance", 0.5)},
        ),
        ("Reward margin", {"training": "rewards/margins", "held-out": "eval_rewards/margins"}, {}),
        ("Rewards", {"chosen": "rewards/chosen", "rejected": "rewards/rejected"}, {}),
        ("Log-probs of the answers", {"chosen": "logps/chosen", "rejected": "logps/rejected"}, {}),
        ("Token accuracy", {"training": "mean_token_accuracy", "held-out": "eval_mean_token_accuracy"}, SHARE),
    ],
    "The answers that it samples": [
        ("Reward of sampled answers", {"mean": "reward", "held-out": "eval_reward"}, {}),
        ("Groups whose answers all earn the same", {"share": "frac_reward_zero_std"}, SHARE),
        (
            "Length of sampled answers, tokens",
            {"mean": "completions/mean_length", "longest": "completions/max_length"},
            {"zero": True},
        ),
        ("Sampled answers that were cut", {"share": "completions/clipped_ratio"}, SHARE),
    ],
    "How it gets there": [
        ("KL divergence from the reference", {"KL": "kl"}, {}),
        ("Entropy of the answers, nats/token", {"entropy": "entropy"}, {}),
        ("Gradient norm", {"norm": "grad_norm"}, {"zero": True}),
        ("Learning rate", {"rate": "learning_rate"}, {"zero": True}),
    ],
    "Speed and memory": [
        ("Pairs/s", {"pairs": "pairs_per_second"}, {"zero": True}),
        ("Tokens/s", {"tokens": "tokens_per_second"}, {"zero": True}),
        ("Peak memory, GiB", {"peak": "memory_peak_gib"}, {"zero": True}),
    ],
}


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
    text = render(
        "report.html.jinja",
        heading=config.get("name") or "/".join(folder.absolute().parts[-2:]),
        lead=headline(summary),
        status=summary["status"],
        checked=count_passed([check["verdict"] for check in summary["checks"]]),
        about=deciding_settings(summary, config),
        results=result_rows(summary["before"], summary["after"], summary.get("changes", {})),
        checks=sorted(summary["checks"], key=lambda check: check["verdict"] == "ok"),
        advice=summary.get("advice", []),
        curves=draw_curves(read_events(folder / "metrics.jsonl")),
        samples=[sample.card() for sample in samples],
        answered=answers_in_words(summary.get("answer_changes", {})),
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


def deciding_settings(summary: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a result depends on, by name; None where it is not known. The rest is in the config."""
    options, train, data = (summary.get(part, {}) for part in ("settings", "train", "data"))
    rows = {split: f"{report['rows']:,}" for split, report in data.items()}
    adapter, trainer = config.get("adapter", {}), config.get("trainer", {}) if train else {}
    sources = {name: str(Provenance(**source)) for name, source in summary.get("sources", {}).items()}
    chosen = {name: option for name, option in options.items() if option is not None}
    for name in sources.keys() & {"model", "data"}:  # `tiny: embedded (apache-2.0)`, but not `shapes: shapes ...`
        option, own = chosen.get(name, ""), sources[name]
        chosen[name] = f"{option}: {own}" if option and not own.startswith(f"{option} ") else own
    return [
        *((name, chosen.pop(name, None)) for name in ("model", "data", "trainer", "adapter")),
        ("rank", adapter.get("r")),
        ("alpha", adapter.get("lora_alpha")),
        ("quant", chosen.pop("quant", None)),
        ("learning rate", trainer.get("learning_rate")),
        ("beta", trainer.get("beta")),
        ("batch size", train.get("batch_size")),
        ("steps", train.get("steps")),
        ("training rows", rows.get("train") if train else None),
        ("held-out rows", rows.get("test")),
        ("seed", summary["seed"]),
        *summary.get("hardware", {}).items(),
        *chosen.items(),
        ("code", sources.get("code")),
        ("time of training", duration(train["seconds"]) if train else None),
        ("total time", duration(summary["seconds"]) if "seconds" in summary else None),
    ]


def answers_in_words(counts: dict[str, int]) -> str:
    """Of summary.json's `answer_changes`; empty where no two answers were compared."""
    if not counts:
        return ""
    return (
        f"Of {sum(counts.values()):,} answers {counts['worse']:,} got worse, {counts['better']:,} better; "
        f"{counts['changed']:,} changed otherwise and {counts['same']:,} are the same."
    )


def draw_curves(events: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The charts that have something to show, in their groups."""
    means = {
        humanize(m.group(1)): key
        for event in events
        for key in event
        if (m := re.fullmatch(r"rewards/(\w+)/mean", key))
    }
    more: dict[str, Curves] = {"The answers that it samples": [("Each reward", means, {})]} if means else {}
    groups = []
    for group, curves in CURVES.items():
        charts = [
            line_chart({name: metric_points(events, key) for name, key in keys.items()}, title, **options)
            for title, keys, options in [*curves, *more.get(group, [])]
        ]
        groups.append((group, [chart for chart in charts if chart]))
    return [(group, charts) for group, charts in groups if charts]


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
    """Of phases that took a tenth of a second at least, as in the terminal."""
    total = sum(seconds.values())
    shown = {PHASES[name]: taken for name, taken in seconds.items() if taken >= 0.1}
    return [(label, f"{duration(taken)} ({percent(taken / total)})") for label, taken in shown.items()]


def reproduce_commands(folder: Path, status: str) -> list[tuple[str, str]]:
    run, command = str(relative_to_cwd(folder)), "python -m smolvlm_exp"
    replay = f"{command} --config-path {shlex.quote(f'{run}/.hydra')} --config-name config"
    resume = f"{command} resume={shlex.quote(run)}"
    return [("Run it again", replay), *([("Resume from its last checkpoint", resume)] if status != "done" else [])]
