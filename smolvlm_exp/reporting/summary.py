"""The results of an evaluation: summary.json's numbers, the table in the terminal, the report's samples."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.preferences import Preferences
from smolvlm_exp.data.truth import image_text
from smolvlm_exp.evaluation.answer_changes import AnswerChange
from smolvlm_exp.evaluation.checks import Check, checks_passed
from smolvlm_exp.evaluation.held_out import SAMPLES, Evaluation
from smolvlm_exp.evaluation.metrics import in_order, metric_of
from smolvlm_exp.evaluation.statistics import changes, intervals
from smolvlm_exp.evaluation.truth_metrics import hallucinated
from smolvlm_exp.evaluation.verdict import verdict
from smolvlm_exp.reporting.html import IMAGES, embed, highlight, highlight_changes
from smolvlm_exp.reporting.results import result_row, wide_console
from smolvlm_exp.utils.files import write_json
from smolvlm_exp.utils.formatting import number, percent
from smolvlm_exp.utils.phases import PHASES

if TYPE_CHECKING:
    from PIL.Image import Image


BETTER = {1: "↑", -1: "↓", 0: ""}  # behind a metric's name


@dataclass(frozen=True)
class Sample:
    """A held-out row with a model's answers to it."""

    row: int
    image: "Image"
    alt: str  # what is in the image, in words
    question: str
    answers: dict[str, str]  # from Before and After tuning, or by step
    hallucinated: dict[str, list[str]]  # an answer's words to mark, none where the truth is unknown
    references: dict[str, str]  # Chosen and Rejected, or the Truth
    verdict: str = ""  # of evaluation/answer_changes.py, on the two answers

    def card(self) -> dict[str, Any]:
        answers = [(name, highlight(text, self.hallucinated[name])) for name, text in self.answers.items()]
        if self.verdict and len(set(self.answers.values())) == 1:
            answers = [("Both", answers[0][1])]
        elif self.verdict:
            (old, new), words = self.answers.values(), self.hallucinated.values()
            answers = list(zip(self.answers, highlight_changes(old, new, *words), strict=True))
        references = [(name, text, "label") for name, text in self.references.items()]
        lines = [*((name, text, "model") for name, text in answers), *references]
        image = embed(self.image)
        return {"image": image, "alt": self.alt, "verdict": self.verdict, "question": self.question, "lines": lines}


def summarize(before: Evaluation, after: Evaluation | None, checks: list[Check]) -> dict[str, Any]:
    """The parts of summary.json that say how good a model is, and how sure that is."""
    evaluations = {"before": before, **({"after": after} if after else {})}
    paired = changes(before.ratios, after.ratios) if after else {}
    return {
        "held_out_rows": max((len(ratio.top) for ratio in before.ratios.values()), default=0),
        "before": before.metrics,
        "after": after.metrics if after else {},
        "intervals": {name: intervals(evaluation.ratios) for name, evaluation in evaluations.items()},
        "changes": {name: asdict(change) for name, change in paired.items()},
        "checks": [asdict(check) for check in checks],
        "checks_passed": checks_passed(checks),
    }


def print_results(summary: dict[str, Any], names: tuple[str, str] = ("before", "after"), tuned: bool = True) -> None:
    """The table of `summarize` in words, what it allows to say, and the checks that did not pass.

    Args:
        tuned: the second was made to be better than the first, so that no gain is worth a word.
    """
    console = wide_console()
    table = Table(f"{summary['held_out_rows']:,} held-out rows", *names, "change", "95 % CI")
    before, after, changes = summary["before"], summary["after"], summary["changes"]
    for key in in_order({**before, **after}):
        row, metric = result_row(key, before, after, changes.get(key)), metric_of(key)
        # Without a change, the interval of the number itself.
        ends = summary["intervals"].get("after", summary["intervals"]["before"]).get(key)
        own = " to ".join(percent(end, 1) if metric.share else number(end) for end in ends) if ends else ""
        name = f"{row.label} {BETTER[metric.good]}".strip()
        style = {"better": "green", "worse": "red"}.get(row.tone)
        table.add_row(name, row.before, row.after, Text(row.change, style or ""), row.interval or own)
    console.print(table)
    console.print(f"{BETTER[1]} more is better, {BETTER[-1]} less is better", style="dim")
    if said := verdict(summary, after if tuned else ()):
        console.print(f"{said[0].upper()}{said[1:]}.", style="yellow")
    print_checks(console, summary["checks"])


def print_checks(console: Console, checks: list[dict[str, Any]]) -> None:
    """How many passed, and those that did not."""
    wrong = [check for check in checks if check["verdict"] != "ok"]
    if checks:
        passed = f"{len(checks) - len(wrong)} of {len(checks)}" if wrong else f"{len(checks)}"
        console.print(f"{passed} checks passed", highlight=False)
    for check in wrong:
        detail = f"; {check['detail']}" if check["detail"] else ""
        line = f"{check['verdict']:>4}  {check['name']}: {check['value']:.2g} (should be {check['threshold']}){detail}"
        style = "red" if check["verdict"] == "fail" else "yellow"
        console.print(line, style=style, highlight=False, soft_wrap=True, markup=False)


def print_phases(seconds: dict[str, float]) -> None:
    """Where the time went, phase by phase; those of less than a tenth of a second are in the total alone."""
    table = Table("time", "seconds", "share")
    total = sum(seconds.values())
    for name, taken in [*seconds.items(), ("total", total)]:
        if taken >= 0.1:
            table.add_row(PHASES.get(name, name), f"{taken:.1f}", f"{taken / total:.0%}")
    wide_console().print(table)


def samples(preferences: Preferences, changes: Sequence[AnswerChange]) -> list[Sample]:
    """A dozen held-out rows with their answers: up to half of them got worse, then come those that got better."""
    ranked = sorted(changes, key=lambda change: change.rank)
    worse = sum(change.verdict == "worse" for change in ranked)
    late = ranked[SAMPLES // 2 : worse]  # further ones that got worse, where there is room
    order = [*ranked[: min(worse, SAMPLES // 2)], *ranked[worse:], *late][:SAMPLES]
    return [
        sample(
            preferences,
            change.row,
            {"Answer": change.before} if change.after is None else {"Before": change.before, "After": change.after},
            {name.capitalize(): text for name, text in change.references.items()},
            change.verdict,
        )
        for change in order
    ]


def save_images(folder: Path, shown: Sequence[Sample]) -> None:
    """As the report embeds them, by row, for those who have the folder but not the data (task=compare)."""
    write_json(folder / IMAGES, {str(each.row): {**embed(each.image), "alt": each.alt} for each in shown})


def sample_histories(preferences: Preferences, events: list[dict[str, Any]]) -> list[Sample]:
    """The first held-out rows with their answers while the model was tuned.

    Args:
        events: of samples.jsonl, by step; where a resumed run answered again, the later answers count.
    """
    at: dict[int, list[str]] = {event["step"]: event["answers"] for event in events}
    return [
        sample(preferences, i, {f"Step {step}": answers[i] for step, answers in at.items()})
        for i in range(min(map(len, at.values()), default=0))
    ]


def sample(
    preferences: Preferences,
    i: int,
    answers: dict[str, str],
    references: dict[str, str] | None = None,
    verdict: str = "",
) -> Sample:
    row = preferences.test[i]
    truth, question = row.get("truth"), text_of(row["prompt"])
    words = {name: hallucinated(text, truth, preferences.words) for name, text in answers.items()}
    alt = image_text(truth, question)
    return Sample(i, row["images"][0], alt, question, answers, words, references or {}, verdict)
