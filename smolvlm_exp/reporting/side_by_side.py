"""The answers of several runs to the same held-out rows, for task=compare, from the runs' folders alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolvlm_exp.evaluation.answer_changes import load_answers
from smolvlm_exp.reporting.html import IMAGES, highlight_changes
from smolvlm_exp.utils.files import read_json

RUNS, ROWS = 6, 12  # at most


def side_by_side(runs: Sequence[tuple[str, Path]]) -> list[dict[str, Any]]:
    """A dozen held-out rows with each run's answer, those on which the runs differ most first.

    Of the rows whose image a run has kept; what differs from the first run's answer is marked.

    Args:
        runs: names and folders, the best first; those that have kept no answers are left out.
    """
    answered = [(name, folder, lines) for name, folder in runs if (lines := load_answers(folder))][:RUNS]
    images = {
        id: own[str(line["row"])]
        for _, folder, lines in answered
        for own in [read_json(folder / IMAGES)]
        for id, line in lines.items()
        if str(line["row"]) in own
    }
    rows = [(id, [lines.get(id, {}) for *_, lines in answered]) for id in images] if len(answered) > 1 else []
    rows = [(id, answers) for id, answers in rows if all("after" in line for line in answers)]
    rows.sort(key=lambda row: [-spread(row[1]), -len({line["after"] for line in row[1]})])
    names = [name for name, *_ in answered]
    return [card(images[id], answers, names) for id, answers in rows[:ROWS]]


def spread(answers: Sequence[dict[str, Any]]) -> float:
    """How much more is wrong with the worst of these answers than with the best."""
    wrong = [line["faults"][-1] for line in answers if line.get("faults")]
    return max(wrong) - min(wrong) if wrong else 0.0


def card(image: dict[str, Any], answers: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    best = answers[0]
    shown = [(names[0], best["after"])]
    shown += [
        (name, highlight_changes(best["after"], line["after"])[1])
        for name, line in zip(names[1:], answers[1:], strict=True)
    ]
    before = {line["before"] for line in answers}
    return {
        "image": image,
        "question": best["question"],
        "references": [(key.capitalize(), best[key]) for key in ("chosen", "rejected", "truth") if best.get(key)],
        "answers": [*([("Before tuning", before.pop())] if len(before) == 1 else []), *shown],
    }
