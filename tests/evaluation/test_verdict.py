"""What few rows, or changes by chance, do not allow to say."""

import pytest

from smolvlm_exp.evaluation.verdict import verdict

UP, DOWN, CHANCE = ({"low": low, "high": high} for low, high in ((0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3)))


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (4, {"preference_accuracy": UP}, "4 held-out rows: too few to tell"),
        (240, {"preference_accuracy": UP}, ""),
        (240, {"preference_accuracy": CHANCE}, "no gain over before"),
        (240, {"preference_accuracy": DOWN}, "no gain over before"),
        (240, {"preference_accuracy": CHANCE, "chair_s": DOWN}, ""),  # of which less is better
        (240, {"mean_length": CHANCE}, ""),  # neither direction is better
        (240, {}, ""),
        (None, {"recall": UP}, ""),  # a summary of an earlier release
    ],
)
def test_what_may_be_said(rows, changes, said):
    summary = {"changes": changes, **({"held_out_rows": rows} if rows else {})}
    assert verdict(summary, changes) == said
