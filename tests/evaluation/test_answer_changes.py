"""Which answers got worse, and that every one is kept."""

import json
from types import SimpleNamespace

import datasets
import pytest

from smolvlm_exp.data.messages import assistant, user
from smolvlm_exp.data.vocabulary import Vocabulary
from smolvlm_exp.evaluation.answer_changes import answer_changes, count_verdicts, load_answers, save_answers
from smolvlm_exp.evaluation.held_out import Evaluation
from smolvlm_exp.evaluation.statistics import mean

WORDS = Vocabulary({kind: kind for kind in ("star", "heart")}, once=True)
HEARTS = {"kind": "caption", "objects": ["heart", "star"], "phrases": ["two red hearts", "a blue star"]}
ROWS = [  # truth, before, after
    ({"kind": "yes_no", "answer": "yes"}, "No.", "Yes."),
    (HEARTS, "Two red hearts and a star.", "A red heart and a star."),  # recall alone would not see it
    (HEARTS, "Two red hearts and a star.", "Two hearts and a blue star."),
    (HEARTS, "Two hearts.", "Two hearts."),
    (HEARTS, "Two hearts and a star.", "A red heart."),
]


def preferences(**columns):
    rows = datasets.Dataset.from_dict({"prompt": [[user(f"Row {i}?")] for i in range(5)], **columns})
    return SimpleNamespace(test=rows, words=WORDS, prints={"test": [bytes([i]) * 32 for i in range(5)]})


def evaluation(answers, accuracy=None):
    return Evaluation({"preference_accuracy": mean(accuracy)} if accuracy else {}, None, list(answers))


def test_answers_are_judged_by_the_truth_and_kept(tmp_path):
    truths, before, after = zip(*ROWS, strict=True)
    changes = answer_changes(preferences(truth=[*map(json.dumps, truths)]), evaluation(before), evaluation(after))
    assert [change.verdict for change in changes] == ["better", "worse", "changed", "same", "worse"]
    assert [change.row for change in sorted(changes, key=lambda change: change.rank)] == [4, 1, 0, 2, 3]
    assert count_verdicts(changes) == {"worse": 2, "better": 1, "changed": 1, "same": 1}
    save_answers(tmp_path, changes)
    first, second, *_ = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert first == {
        "row": 0, "id": "00" * 8, "question": "Row 0?", "truth": "yes", "before": "No.", "after": "Yes.",
        "faults": [1, 0], "verdict": "better",
    }  # fmt: skip
    assert second["faults"] == [0, 1]
    assert load_answers(tmp_path)["01" * 8] == second
    (tmp_path / "answers.jsonl").write_text('{"row": 1')
    assert load_answers(tmp_path) == {}


def test_without_truth_the_preference_decides():
    """The first two rows alone were answered, as for a report."""
    given = {side: [[assistant(f"{side} {i}")] for i in range(5)] for side in ("chosen", "rejected")}
    changes = answer_changes(
        preferences(**given), evaluation("ab", [1, 0.5, 0, 1, 1]), evaluation("ac", [0, 0.5, 1, 1, 1])
    )
    assert [change.verdict for change in changes] == ["worse", "changed"]
    assert changes[0].references == {"chosen": "chosen 0", "rejected": "rejected 0"}


@pytest.mark.parametrize("accuracy", [None, [1, 1, 1, 1, 1]])
def test_one_model_alone_is_not_judged(accuracy):
    changes = answer_changes(preferences(), evaluation("abcde", accuracy), None)
    assert {change.verdict for change in changes} == {""}
    assert changes[1].line() == {"row": 1, "id": "01" * 8, "question": "Row 1?", "truth": "", "before": "b"}
    assert count_verdicts(changes) == {}
