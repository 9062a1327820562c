"""What looks at the held-out rows come to: summary.json's numbers, the table in the terminal, the report's samples."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.preferences import Preferences
from smolvlm_exp.evaluation.checks import Check, checks_passed
from smolvlm_exp.evaluation.held_out import SAMPLES, Evaluation, hallucinated
from smolvlm_exp.evaluation.statistics import Change
from smolvlm_exp.reporting.samples import Sample, SampleHistory


def summarize(before: Evaluation, after: Evaluation | None, checks: list[Check]) -> dict[str, Any]:
    """The parts of summary.json that say how good a model is, and how sure that is."""
    looks = {"before": before, **({"after": after} if after else {})}
    return {
        "before": before.metrics,
        "after": after.metrics if after else {},
        "intervals": {name: look.intervals() for name, look in looks.items()},
        "changes": {name: asdict(change) for name, change in after.changes(before).items()} if after else {},
        "checks": [asdict(check) for check in checks],
        "checks_passed": checks_passed(checks),
    }


def print_results(console: Console, summary: dict[str, Any], names: tuple[str, str] = ("before", "after")) -> None:
    """The table of `summarize`, and the checks beneath it."""
    table = Table("held out", *names, "change", "95 % CI", "p", title=None)
    before, after, changes = summary["before"], summary["after"], summary["changes"]
    for key in after or before:
        numbers = ["" if v is None else f"{v:.3f}" for v in (before.get(key), after.get(key))]
        change = Change(**changes[key]) if key in changes else None
        table.add_row(key, *numbers, *(in_words(change) if change else alone(summary, key)))
    console.print(table)
    for check in summary["checks"]:
        detail = f"; {check['detail']}" if check["detail"] else ""
        line = f"{check['verdict']:>4}  {check['name']}: {check['value']:.2g} ({check['threshold']}){detail}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def in_words(change: Change) -> tuple[str, str, str]:
    p = f"{change.p:.3f}" if change.p >= 0.001 else "<0.001"
    return f"{change.difference:+.3f}", f"{change.low:+.3f} to {change.high:+.3f}", p


def alone(found: dict[str, Any], key: str) -> tuple[str, str, str]:
    """Where there is no change: the interval of the number itself."""
    ends = found["intervals"].get("after", found["intervals"]["before"]).get(key)
    return "", f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "", ""


def samples(preferences: Preferences, before: list[str], after: list[str]) -> list[Sample]:
    """A dozen held-out rows with both answers, those whose answer changed first."""
    order = sorted(range(len(after)), key=lambda i: before[i] == after[i])[:SAMPLES]
    made = []
    for i, row in ((i, preferences.test[i]) for i in order):
        truth = row.get("truth")
        made.append(
            Sample(
                image=row["images"][0],
                question=text_of(row["prompt"]),
                chosen=text_of(row.get("chosen", [])),
                rejected=text_of(row.get("rejected", [])),
                before=before[i],
                after=after[i],
                hallucinated_before=hallucinated(before[i], truth, preferences.words),
                hallucinated_after=hallucinated(after[i], truth, preferences.words),
                truth="" if "chosen" in row else in_short(json.loads(row["truth"])),
            )
        )
    return made


def sample_histories(preferences: Preferences, events: list[dict[str, Any]]) -> list[SampleHistory]:
    """The first held-out rows with their answers while the model was tuned.

    Args:
        events: of samples.jsonl, by step; where a resumed run answered again, the later answers count.
    """
    at: dict[int, list[str]] = {event["step"]: event["answers"] for event in events}
    made = []
    for i in range(min(map(len, at.values()), default=0)):
        row = preferences.test[i]
        answers = [
            (step, said[i], hallucinated(said[i], row.get("truth"), preferences.words)) for step, said in at.items()
        ]
        made.append(SampleHistory(row["images"][0], text_of(row["prompt"]), answers))
    return made


def in_short(truth: dict[str, Any]) -> str:
    """What is known of a picture."""
    return truth["answer"] if truth["kind"] == "yes_no" else ", ".join(truth["objects"])
