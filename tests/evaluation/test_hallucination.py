"""CHAIR and POPE against worked examples."""

import pytest

from smolvlm_exp.evaluation.hallucination import Caption, chair, mentions, yes_no, yes_or_no


def values(ratios):
    return {name: ratio.value for name, ratio in ratios.items()}


KINDS = ("star", "moon", "cross", "ring")


def test_mentions_are_whole_words_once_plurals_too():
    assert mentions("Two crosses, a star, another star and three moons.", KINDS) == ["cross", "star", "moon"]
    assert mentions("A starry string of rings", KINDS) == ["ring"]
    assert mentions("", KINDS) == []


def test_chair_by_hand():
    captions = [
        Caption(["star", "moon"], ["star"], 6),  # 1 of 2 mentions is not there; 1 of 1 objects named
        Caption(["ring"], ["ring", "cross"], 4),  # 0 of 1; 1 of 2
        Caption([], ["star"], 0),  # nothing said: 0 of 0; 0 of 1
    ]
    assert values(chair(captions)) == {
        "chair_s": pytest.approx(1 / 3),
        "chair_i": pytest.approx(1 / 3),
        "recall": pytest.approx(2 / 4),
        "mean_length": pytest.approx(10 / 3),
    }
    assert chair([]) == {}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes, there is.", "yes"),
        ("no", "no"),
        (" No.", "no"),
        ("yesterday", None),
        ("There is no star", None),
        ("", None),
    ],
)
def test_the_first_word_decides(answer, said):
    assert yes_or_no(answer) == said


def test_pope_by_hand():
    # truth yes yes yes no no; said yes no None yes no: one true positive, two said yes, three are yes
    scores = yes_no(["yes", "no", None, "yes", "no"], ["yes", "yes", "yes", "no", "no"])
    assert values(scores) == {
        "yes_no_accuracy": pytest.approx(2 / 5),
        "yes_no_f1": pytest.approx(2 * 1 / (2 + 3)),
        "yes_ratio": pytest.approx(2 / 5),
    }
    assert yes_no([], []) == {}
