"""What an evaluation comes to: summary.json's numbers, the table in the terminal, the report's samples."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.preferences import Preferences
from smolvlm_exp.evaluation.checks import Check, checks_passed
from smolvlm_exp.evaluation.held_out import SAMPLES, Evaluation, hallucinated
from smolvlm_exp.evaluation.statistics import Change, changes, intervals
from smolvlm_exp.reporting.html import embed, highlight

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Sample:
    """One held-out row, answered before and after."""

    image: "Image"
    question: str
    chosen: str
    rejected: str
    before: str  # the base model's greedy answer
    after: str  # the tuned model's
    hallucinated_before: list[str]  # words to mark, empty where the truth is unknown
    hallucinated_after: list[str]
    truth: str = ""  # in place of chosen and rejected, where there are none

    def card(self) -> dict[str, Any]:
        labels = [("Truth", self.truth)] if self.truth else [("Chosen", self.chosen), ("Rejected", self.rejected)]
        lines = [
            ("Before", highlight(self.before, self.hallucinated_before), "model"),
            ("After", highlight(self.after, self.hallucinated_after), "model"),
            *((name, text, "label") for name, text in labels),
        ]
        return {"image": embed(self.image), "question": self.question, "lines": lines}


def summarize(before: Evaluation, after: Evaluation | None, checks: list[Check]) -> dict[str, Any]:
    """The parts of summary.json that say how good a model is, and how sure that is."""
    evaluations = {"before": before, **({"after": after} if after else {})}
    paired = changes(before.ratios, after.ratios) if after else {}
    return {
        "before": before.metrics,
        "after": after.metrics if after else {},
        "intervals": {name: intervals(evaluation.ratios) for name, evaluation in evaluations.items()},
        "changes": {name: asdict(change) for name, change in paired.items()},
        "checks": [asdict(check) for check in checks],
        "checks_passed": checks_passed(checks),
    }


def print_results(console: Console, summary: dict[str, Any], names: tuple[str, str] = ("before", "after")) -> None:
    """The table of `summarize`, and the checks beneath it."""
    table = Table("held out", *names, "change", "95 % CI", "p", title=None)
    before, after, changes = summary["before"], summary["after"], summary["changes"]
    for key in after or before:
        numbers = ["" if v is None else f"{v:.3f}" for v in (before.get(key), after.get(key))]
        if key in changes:
            change = Change(**changes[key])
            p = f"{change.p:.3f}" if change.p >= 0.001 else "<0.001"
            table.add_row(key, *numbers, f"{change.difference:+.3f}", f"{change.low:+.3f} to {change.high:+.3f}", p)
        else:  # the interval of the number itself
            ends = summary["intervals"].get("after", summary["intervals"]["before"]).get(key)
            table.add_row(key, *numbers, "", f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "", "")
    console.print(table)
    for check in summary["checks"]:
        detail = f"; {check['detail']}" if check["detail"] else ""
        line = f"{check['verdict']:>4}  {check['name']}: {check['value']:.2g} ({check['threshold']}){detail}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def samples(preferences: Preferences, before: list[str], after: list[str]) -> list[Sample]:
    """A dozen held-out rows with both answers, those whose answer changed first."""
    order = sorted(range(len(after)), key=lambda i: before[i] == after[i])[:SAMPLES]
    made = []
    for i, row in ((i, preferences.test[i]) for i in order):
        truth = json.loads(row.get("truth") or "{}")
        known = truth["answer"] if truth.get("kind") == "yes_no" else ", ".join(truth.get("objects", ()))
        made.append(
            Sample(
                image=row["images"][0],
                question=text_of(row["prompt"]),
                chosen=text_of(row.get("chosen", [])),
                rejected=text_of(row.get("rejected", [])),
                before=before[i],
                after=after[i],
                hallucinated_before=hallucinated(before[i], row.get("truth"), preferences.words),
                hallucinated_after=hallucinated(after[i], row.get("truth"), preferences.words),
                truth="" if "chosen" in row else known,
            )
        )
    return made


def sample_histories(preferences: Preferences, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cards of the first held-out rows with their answers while the model was tuned.

    Args:
        events: of samples.jsonl, by step; where a resumed run answered again, the later answers count.
    """
    at: dict[int, list[str]] = {event["step"]: event["answers"] for event in events}
    cards = []
    for i in range(min(map(len, at.values()), default=0)):
        row, lines = preferences.test[i], []
        for step, answers in at.items():
            words = hallucinated(answers[i], row.get("truth"), preferences.words)
            lines.append((f"Step {step}", highlight(answers[i], words), "model"))
        cards.append({"image": embed(row["images"][0]), "question": text_of(row["prompt"]), "lines": lines})
    return cards
