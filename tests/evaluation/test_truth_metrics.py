"""Which measures a row's truth brings, over made-up answers."""

import json

import pytest

from smolvlm_exp.data.vocabulary import Vocabulary
from smolvlm_exp.evaluation.metrics import GOALS, METRICS
from smolvlm_exp.evaluation.truth_metrics import faults, truth_metrics

WORDS = Vocabulary({kind: kind for kind in ("star", "moon", "ring")}, once=True)
ANSWERS = {
    "I see a red star, a red star and a moon.": {
        "kind": "caption", "objects": ["star", "moon"], "phrases": ["a small red star", "a large blue moon"],
    },
    "A blue star and a ring.": {"kind": "caption", "objects": ["star"], "phrases": ["a small red star"]},
    "Yes, there is.": {"kind": "yes_no", "answer": "no"},
    "Two.": {"kind": "number", "answer": 2, "objects": ["star"]},
    "Green.": {"kind": "answer", "answer": ["red", "pink"]},
}  # fmt: skip


def test_every_kind_of_truth():
    found = truth_metrics([*ANSWERS, "A star."], [*map(json.dumps, ANSWERS.values()), None], WORDS)
    assert {name: ratio.value for name, ratio in found.items()} == {
        "chair_s": 1 / 2, "chair_i": 1 / 4, "recall": 1, "mean_length": 17 / 2,
        "attribute_accuracy": pytest.approx(3 / 4), "count_accuracy": 1, "repeat_rate": 1 / 2,
        "yes_no_accuracy": 0, "yes_no_f1": 0, "yes_ratio": 1, "answer_accuracy": 1 / 2,
    }  # fmt: skip
    assert found.keys() <= METRICS.keys()
    goals = {name: GOALS[f"after.{name}"] for name in ("attribute_accuracy", "repeat_rate", "answer_accuracy")}
    assert goals == {"attribute_accuracy": 1, "repeat_rate": -1, "answer_accuracy": 1}


def test_captions_without_a_vocabulary_or_attributes():
    caption = json.dumps({"kind": "caption", "objects": ["star"]})
    assert truth_metrics(["A star."], [caption], None) == {}
    assert "attribute_accuracy" not in truth_metrics(["A star."], [caption], WORDS)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Two small red stars and a moon.", 0),
        ("A small red star and a moon.", 1),  # its number
        ("Two blue stars and a moon.", 1),
        ("Two red stars.", 1),
        ("Two red stars, a moon and a ring.", 1),
        ("A moon and a moon.", 2),  # the stars are missing
    ],
)
def test_faults_of_a_caption(answer, expected):
    truth = {"kind": "caption", "objects": ["star", "moon"], "phrases": ["two small red stars", "a large grey moon"]}
    assert faults(answer, json.dumps(truth), WORDS) == expected


def test_other_answers_are_right_or_wrong_or_unknown():
    truths = [{"kind": "yes_no", "answer": "no"}, {"kind": "number", "answer": 2}, {"kind": "answer", "answer": "red"}]
    for answers, expected in ((("No.", "Two", "Red"), 0), (("Yes", "3", "blue"), 1)):
        for answer, truth in zip(answers, truths, strict=True):
            assert faults(answer, json.dumps(truth), None) == expected
    assert faults("A dog.", json.dumps({"kind": "reference", "caption": "A cat."}), WORDS) is None
    assert faults("A dog.", None, WORDS) is None
