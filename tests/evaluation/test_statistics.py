"""Intervals and paired tests against results derived in another way."""

from itertools import product
from math import sqrt

import numpy as np
import pytest

from smolvlm_exp.evaluation import statistics
from smolvlm_exp.evaluation.statistics import changes, intervals, mean, ratio


def interval(metric):
    return intervals({"": metric})[""]


def compare(before, after):
    return changes({"": before}, {"": after})[""]


def test_a_ratio_of_sums_by_hand():
    assert ratio([1, 0, 2], [2, 1, 5]).value == pytest.approx(3 / 8)
    assert ratio([0, 0], [0, 0]).value == 0
    assert ratio([0, 0], [0, 0], empty=1.0).value == 1
    assert mean([True, False, True, True]).value == pytest.approx(0.75)


def test_the_interval_of_a_share_is_binomial():
    """p +- 1.96 sqrt(p (1 - p) / n), which 400 rows are enough for."""
    low, high = interval(mean([1] * 120 + [0] * 280))
    half = 1.96 * sqrt(0.3 * 0.7 / 400)
    assert (low, high) == (pytest.approx(0.3 - half, abs=5e-3), pytest.approx(0.3 + half, abs=5e-3))
    assert interval(mean([1] * 120 + [0] * 280)) == (low, high)


def test_95_percent_intervals_cover_the_truth_in_95_percent_of_cases():
    draw = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        top, bottom = draw.poisson(1, 80), 1 + draw.poisson(2, 80)  # a ratio like CHAIR_i's: 1 to 3
        low, high = interval(ratio(top, bottom))
        covered += low <= 1 / 3 <= high
    assert 0.9 <= covered / 200 <= 0.98


@pytest.mark.parametrize("after", [[1, 1, 1, 1, 1, 1, 0, 1], [0, 1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 0, 1, 0, 0]])
def test_the_paired_test_is_the_permutation_test(after):
    """Against all 256 ways to swap eight rows."""
    before = [0, 0, 1, 0, 0, 0, 0, 1]
    both = np.array(list(zip(before, after, strict=True)), dtype=float)
    observed = abs(both[:, 1].mean() - both[:, 0].mean())
    extreme = 0
    for swapped in product((False, True), repeat=8):
        turned = np.where(np.array(swapped)[:, None], both[:, ::-1], both)
        extreme += abs(turned[:, 1].mean() - turned[:, 0].mean()) >= observed - 1e-12
    change = compare(mean(before), mean(after))
    assert change.difference == pytest.approx(np.mean(after) - np.mean(before))
    assert change.p == pytest.approx(extreme / 256, abs=0.03)
    assert change.low <= change.difference <= change.high


def test_two_equal_evaluations_do_not_differ():
    same = ratio([1, 0, 2, 1], [2, 1, 3, 1])
    change = compare(same, same)
    assert (change.difference, change.low, change.high, change.p) == (0, 0, 0, 1)
    with pytest.raises(AssertionError, match="different rows"):
        compare(same, mean([1, 2]))


def test_resampling_in_portions_changes_nothing(monkeypatch):
    metric = mean(np.random.default_rng(0).random(300).tolist())
    at_once = interval(metric)
    monkeypatch.setattr(statistics, "AT_ONCE", 1000)  # three resamples at a time
    assert interval(metric) == pytest.approx(at_once, abs=1e-12)
    assert compare(metric, metric).p == 1


def test_metrics_get_the_same_result_together_as_alone():
    draw = np.random.default_rng(5)
    before = {
        name: ratio(draw.random(rows), 1 + draw.random(rows)) for name, rows in zip("abcd", (9, 20, 9, 20), strict=True)
    }
    after = {name: ratio(draw.random(len(before[name].top)), before[name].bottom) for name in "abd"}
    assert intervals(before) == {name: interval(metric) for name, metric in before.items()}
    assert changes(before, after) == {name: compare(before[name], after[name]) for name in after}
