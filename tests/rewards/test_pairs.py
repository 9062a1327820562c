"""Which of a row's scored answers become pairs, on numbers made by hand."""

import pytest

from smolvlm_exp.rewards.pairs import ScoredAnswer, select_pairs, without_pairs


def answers(*rows):
    """Of (text, score, logp, tokens); those of no tokens were cut."""
    return [ScoredAnswer(text, score, logp, tokens or 9, tokens > 0, {}) for text, score, logp, tokens in rows]


ROW = answers(
    ("best", 2.0, -0.9, 10),
    ("also best", 2.0, -0.5, 10),
    ("surest", 1.0, -0.1, 10),
    ("worst", -1.0, -0.8, 10),
    ("close", 1.8, -0.2, 10),
    ("long", 0.0, -0.4, 40),
    ("cut", 0.5, -0.1, 0),
    ("", 0.0, -0.1, 1),
    ("surest", 1.0, -0.1, 10),
    ("not scored", None, -0.1, 10),
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(1, 2), (0, 3)]),  # `long` is four times as long, `close` within the margin
        ({"rejected": "worst"}, [(1, 3), (0, 2)]),
        ({"pairs": 1}, [(1, 2)]),
        ({"pairs": 9}, [(1, 2), (0, 3)]),
        ({"pairs": 9, "max_length_ratio": 4.0}, [(1, 2), (0, 5), (1, 3)]),  # the chosen ones by turns
        ({"margin": 0.1}, [(1, 2), (0, 4)]),
        ({"margin": 3.0}, [(1, 3)]),
        ({"margin": 3.1}, []),
    ],
)
def test_pairs_of_a_row(options, expected):
    assert (
        select_pairs(ROW, **{"pairs": 2, "margin": 0.5, "max_length_ratio": 3.0, "rejected": "likeliest", **options})
        == expected
    )


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((2.0, 2.0), "all_right"),
        ((1.0, 1.0), "all_wrong"),
        ((1.0, 1.2), "no_margin"),
        ((None, None), "unscored"),
    ],
)
def test_why_a_row_has_no_pairs(scores, expected):
    row = answers(*((f"answer {i}", score, -1.0, 5) for i, score in enumerate(scores)), ("cut", 0.0, -1.0, 0))
    assert without_pairs(row, highest=2.0) == expected
    assert select_pairs(row, 2, 0.5, 3.0, "likeliest") == []
