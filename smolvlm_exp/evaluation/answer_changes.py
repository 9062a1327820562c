"""What tuning did to the answer to each held-out row, and `answers.jsonl`, which keeps every answer."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.truth import truth_text
from smolvlm_exp.evaluation.truth_metrics import faults
from smolvlm_exp.utils.files import json_lines, write_text

if TYPE_CHECKING:
    from smolvlm_exp.data.preferences import Preferences
    from smolvlm_exp.evaluation.held_out import Evaluation

FILE = "answers.jsonl"  # in the run folder, per line an AnswerChange
VERDICTS = ("worse", "better", "changed", "same")


@dataclass(frozen=True)
class AnswerChange:
    row: int  # of the held-out rows
    id: str  # of its question and images: the same in every run
    question: str
    references: dict[str, str]  # chosen and rejected, or the truth
    before: str
    after: str | None  # None: of one model alone
    faults: tuple[float, float] | None  # before and after; None where nobody can tell

    @property
    def verdict(self) -> str:
        """One of VERDICTS; empty where there is nothing to compare."""
        if self.after is None:
            return ""
        first, second = self.faults or (0, 0)
        if first != second:
            return "worse" if second > first else "better"
        return "same" if self.before == self.after else "changed"

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts rows: the worst, then those that got better, then others that changed."""
        first, second = self.faults or (0, 0)
        return (VERDICTS.index(self.verdict) if self.verdict else 0), -abs(second - first)

    def line(self) -> dict[str, Any]:
        """In the file; without what is unknown."""
        compared = {"faults": self.faults, "verdict": self.verdict or None}
        line = {"row": self.row, "id": self.id, "question": self.question, **self.references}
        answers = {"before": self.before, "after": self.after}
        return line | {name: value for name, value in (answers | compared).items() if value is not None}


def answer_changes(preferences: "Preferences", before: "Evaluation", after: "Evaluation | None") -> list[AnswerChange]:
    """Of all rows that were answered.

    An answer is worse with more `faults`. Where no truth tells them, a row is worse where the rejected answer has
    become the likelier one.
    """
    columns = [name for name in preferences.test.column_names if name in ("prompt", "truth", "chosen", "rejected")]
    rows = preferences.test.select_columns(columns)
    preferred = [e.ratios.get("preference_accuracy") for e in (before, after) if e]

    def change(i: int, row: dict[str, Any]) -> AnswerChange:
        answers = [evaluation.answers[i] for evaluation in (before, after) if evaluation]
        wrong = [faults(answer, row.get("truth"), preferences.words) for answer in answers]
        if None in wrong:
            wrong = [None if ratio is None else 1 - float(ratio.top[i]) for ratio in preferred]
        known = [fault for fault in wrong if fault is not None]
        return AnswerChange(
            row=i,
            id=preferences.prints["test"][i].hex()[:16],
            question=text_of(row["prompt"]),
            references=references(row),
            before=answers[0],
            after=answers[1] if after else None,
            faults=(known[0], known[1]) if len(known) == 2 else None,
        )

    return [change(i, row) for i, row in zip(range(len(before.answers)), rows, strict=False)]


def references(row: dict[str, Any]) -> dict[str, str]:
    """The answers or the truth that a row's answer is compared with."""
    if "chosen" in row:
        return {side: text_of(row[side]) for side in ("chosen", "rejected") if side in row}
    return {"truth": truth_text(row.get("truth"))}


def count_verdicts(changes: Sequence[AnswerChange]) -> dict[str, int]:
    counts = Counter(change.verdict for change in changes)
    return {verdict: counts[verdict] for verdict in VERDICTS} if any(counts[verdict] for verdict in VERDICTS) else {}


def save_answers(folder: Path, changes: Sequence[AnswerChange]) -> None:
    lines = (json.dumps(change.line(), ensure_ascii=False) for change in changes)
    write_text(folder / FILE, "".join(f"{line}\n" for line in lines))


def load_answers(folder: Path) -> dict[str, dict[str, Any]]:
    """A run's lines by their id; empty where the file is missing or damaged."""
    if not (folder / FILE).is_file():  # a pipe would be read without end
        return {}
    try:
        lines = [json.loads(line) for _, line in json_lines((folder / FILE).read_text(encoding="utf-8"))]
        return {line["id"]: line for line in lines}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
