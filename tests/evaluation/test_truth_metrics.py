"""Which measures a row's truth brings, over made-up answers."""

import json

import pytest

from smolvlm_exp.data.vocabulary import Vocabulary
from smolvlm_exp.evaluation.metrics import GOALS, METRICS
from smolvlm_exp.evaluation.truth_metrics import truth_metrics

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
        "attribute_accuracy": pytest.approx(3 / 4), "repeat_rate": 1 / 2,
        "yes_no_accuracy": 0, "yes_no_f1": 0, "yes_ratio": 1, "answer_accuracy": 1 / 2,
    }  # fmt: skip
    assert found.keys() <= METRICS.keys()
    goals = {name: GOALS[f"after.{name}"] for name in ("attribute_accuracy", "repeat_rate", "answer_accuracy")}
    assert goals == {"attribute_accuracy": 1, "repeat_rate": -1, "answer_accuracy": 1}


def test_captions_without_a_vocabulary_or_attributes():
    caption = json.dumps({"kind": "caption", "objects": ["star"]})
    assert truth_metrics(["A star."], [caption], None) == {}
    assert "attribute_accuracy" not in truth_metrics(["A star."], [caption], WORDS)
