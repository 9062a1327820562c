"""task=compare: runs grouped by what they differ in, and which differences are noise."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml

from smolvlm_exp.evaluation.comparison import PerRowResults, Run, compare_runs, load_per_row, save_per_row
from smolvlm_exp.evaluation.statistics import mean
from smolvlm_exp.reporting.comparison_page import column_name, delta, lead, print_comparison
from smolvlm_exp.tasks.compare import compare, find_runs
from smolvlm_exp.tasks.runs import run_row
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose


def run(folder, value, seed=0, rate=1e-4, interval=0.05, **more):
    (folder / ".hydra").mkdir(parents=True)
    config = {"adapter": {"r": 8}, "trainer": {"learning_rate": rate}, "name": folder.name, "seed": seed, **more}
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {
        "status": "done", "seed": seed, "after": {"preference_accuracy": value, "recall": 0.9},
        "intervals": {"after": {"preference_accuracy": [value - interval, value + interval]}},
        "train": {"seconds": 10.0, "memory_peak_gib": 1.0, "pairs_per_second": 5.0},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {0.7 - 0.1 * i}}}\n' for i in (1, 2, 3)))


def of(value, seed=0, rate=1e-4, interval=0.05):
    intervals = {"after": {"preference_accuracy": [value - interval, value + interval]}}
    summary = {"seed": seed, "after": {"preference_accuracy": value}, "intervals": intervals}
    return Run(None, {"trainer.learning_rate": str(rate), "adapter.r": "8"}, summary)


def of_rows(right, seed=0, rate=1e-4, numbers=range(100)):
    """A run whose every held-out row is known."""
    rows = PerRowResults(
        np.arange(3, dtype=np.uint64), np.array(numbers, dtype=np.uint64), {"preference_accuracy": mean(right)}
    )
    return replace(of(float(np.mean(right)), seed, rate, interval=0.09), rows=rows)


METRIC = "after.preference_accuracy"


def test_seeds_are_one_group_and_its_interval_is_students():
    found = compare_runs([of(0.80, 0), of(0.82, 1), of(0.84, 2), of(0.6, rate=1e-5)], METRIC)
    assert found.keys == ["trainer.learning_rate"]
    best, other = found.groups
    assert best.value(METRIC) == pytest.approx(0.82)
    seed_error = 4.303 * 0.02 / 3**0.5  # t with 2 degrees of freedom
    assert best.seed_error(METRIC) == pytest.approx(seed_error, abs=1e-4)
    assert best.error(METRIC) == pytest.approx((seed_error**2 + 0.05**2) ** 0.5, abs=1e-4)  # and other rows
    assert other.error(METRIC) == pytest.approx(0.05)  # one run: what it measured itself
    assert (found.verdict(best), found.verdict(other)) == ("best", "worse")


def test_without_pairs_runs_are_compared_by_reward():
    """Each reward has its column behind their sum, and its arrow; what one run lacks has none."""
    measured = {
        "4": {"reward_objects": 0.2, "recall": 0.9, "reward_number": 1.0, "reward": 0.5},
        "8": {"reward_objects": 0.7, "recall": 0.9, "reward": 1.5},
    }
    runs = [Run(None, {"adapter.r": r}, {"seed": 0, "after": after}) for r, after in measured.items()]
    found = compare_runs(runs, None)
    assert found.metrics == ["after.reward", "after.recall", "after.reward_objects"]
    assert [group.settings["adapter.r"] for group in found.groups] == ["8", "4"]
    assert [column_name(path) for path in found.metrics] == ["reward ↑", "recall ↑", "reward objects ↑"]
    assert lead(found).startswith("2 runs, compared by reward ↑. Best: r=8, 1.5.")
    assert compare_runs([of(0.8), *runs], None).metric == METRIC


def test_a_difference_within_both_intervals_is_noise():
    found = compare_runs([of(0.80, rate=1e-4), of(0.75, rate=1e-5)], METRIC)  # 0.05 < sqrt(2) 0.05
    assert found.verdict(found.groups[1]) == "within the noise"
    found = compare_runs([of(0.80, rate=1e-4), of(0.72, rate=1e-5)], METRIC)
    assert found.verdict(found.groups[1]) == "worse"


def test_seeds_that_agree_still_have_the_noise_of_the_rows():
    """Three seeds with the same number on the same 60 rows: their t interval is nothing, that of the rows is not."""
    found = compare_runs(
        [of(0.65, seed) for seed in range(3)] + [of(0.61, seed, rate=1e-5) for seed in range(3)], METRIC
    )
    assert found.groups[0].seed_error(METRIC) == 0
    assert found.groups[0].error(METRIC) == pytest.approx(0.05)
    assert found.verdict(found.groups[1]) == "within the noise"  # 0.04 < sqrt(2) 0.05


def test_runs_on_other_rows_than_their_settings_say(capsys):
    same, other, unknown = of(0.8), of(0.7, rate=1e-5), of(0.6, rate=1e-6)
    runs = [replace(run, summary={**run.summary, "data_digest": d}) for run, d in ((same, "a"), (other, "b"))]
    assert not compare_runs([runs[0], unknown], METRIC).rows_changed
    print_comparison(compare_runs(runs, METRIC))
    assert "data: the training rows changed between these runs" in capsys.readouterr().out


def test_a_repeated_run_is_no_second_seed():
    found = compare_runs([of(0.80, 0), of(0.84, 1), of(0.80, 0)], METRIC).groups[0]
    assert found.value(METRIC) == pytest.approx(0.82)
    assert found.seed_error(METRIC) == pytest.approx(12.706 * 0.02828 / 2**0.5, abs=1e-3)


def test_the_same_rows_are_compared_row_by_row():
    """90 rows that both get right or wrong alike say nothing of their difference; ten that one alone gets right do."""
    best, other = [1] * 70 + [0] * 30, [1] * 60 + [0] * 40
    found = compare_runs([of_rows(best), of_rows(other, rate=1e-5)], METRIC)
    gap = found.gaps[1]
    assert gap.difference == pytest.approx(-0.1)
    assert gap.noise == pytest.approx(1.96 * (0.1 * 0.9 / 100) ** 0.5, abs=5e-3)
    assert found.verdict(found.groups[1]) == "worse"
    assert delta(found, found.groups[1]) == "\N{MINUS SIGN}10.0 ± 6.0 points"
    assert lead(found).endswith("Best: learning_rate=0.0001, 70.0\xa0% ± 9.0. Worse: learning_rate=1e-05.")
    other_rows = compare_runs([of_rows(best), of_rows(other, rate=1e-5, numbers=range(1, 101))], METRIC)
    assert other_rows.verdict(other_rows.groups[1]) == "within the noise"


def test_per_row_results_are_saved_and_read(tmp_path):
    prints = {"train": [b"12345678 and more", b"abcdefgh"], "test": [b"87654321"] * 3}
    save_per_row(tmp_path, prints, {"recall": mean([1, 0, 1])})
    rows = load_per_row(tmp_path)
    assert (len(rows.train), len(set(rows.test.tolist())), rows.ratios["recall"].value) == (2, 1, pytest.approx(2 / 3))
    file = tmp_path / "rows.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert load_per_row(tmp_path) is None
    assert load_per_row(tmp_path / "nowhere") is None


def test_lower_is_better_where_the_metric_says_so():
    runs = [Run(None, {"r": str(r)}, {"after": {"chair_s": value}}) for r, value in ((4, 0.5), (8, 0.1), (16, 0.3))]
    assert [group.settings["r"] for group in compare_runs(runs, "after.chair_s").groups] == ["8", "16", "4"]


def test_runs_are_named_by_folders_patterns_and_parents(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    run(tmp_path / "outputs" / "day" / "a", 0.9)
    run(tmp_path / "outputs" / "day" / "b", 0.6, rate=1e-5)
    run(tmp_path / "elsewhere", 0.7, rate=1e-3, interval=0.3, seed=3)
    compare(compose("task=compare", "runs=[outputs/day/*,elsewhere]"), tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert [row["run"] for row in rows] == ["outputs/day/a", "elsewhere", "outputs/day/b"]
    assert [row["verdict"] for row in rows] == ["best", "within the noise", "worse"]
    assert [float(row["group_ci95.after.preference_accuracy"]) for row in rows] == pytest.approx([0.05, 0.3, 0.05])
    assert [float(row["delta_to_best"]) for row in rows] == pytest.approx([0, -0.2, -0.3])
    assert [row["seed"] for row in rows] == ["0", "3", "0"]
    (table,) = tmp_path.glob("out/wandb/offline-run-*/files/media/table/compare*.table.json")
    logged = json.loads(table.read_text())
    verdict = logged["columns"].index("verdict")
    assert [row[verdict] for row in logged["data"]] == [row["verdict"] for row in rows]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "90.0\u00a0% ± 5.0" in page
    assert '<a href="../outputs/day/a/report.html">outputs/day/a</a>' in page
    assert len(re.findall(r"learning_rate=0\.0001", page)) >= 2  # a line of the chart, and its folder
    assert "90.0" in capsys.readouterr().out
    names = [f"{tmp_path}/outputs/day/*", "outputs/day/a", "outputs/day"]  # a run counts once
    assert find_runs(names) == [tmp_path / "outputs" / "day" / name for name in "ab"]
    by_recall = compose("task=compare", "runs=[outputs/day]", "metric=after.recall", "tracker=none")
    assert {group.value("after.recall") for group in compare(by_recall, tmp_path / "out").groups} == {0.9}


@pytest.mark.parametrize(
    ("named", "message"),
    [("[]", "needs at least two finished runs"), ("[nowhere]", "runs: nowhere matches no finished run"),
     ("[last]", "sweep=last: there is no sweep")],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch, named, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=re.escape(message)):
        compare(compose("task=compare", f"runs={named}"), tmp_path)


@pytest.mark.parametrize("ends", [None, 5, [0.1], ["x", 0.2], [0.1, None], [[], {}], [0, 1e308], {"low": 1}])
def test_an_interval_in_another_form_is_none(tmp_path, ends):
    run(tmp_path / "a", 0.8)
    run(tmp_path / "b", 0.6, rate=1e-5)
    file = tmp_path / "b" / "summary.json"
    saved = json.loads(file.read_text())
    change = dict(zip(("low", "high"), ends, strict=False)) if isinstance(ends, list) else ends
    saved |= {"intervals": {"after": {"preference_accuracy": ends}, "before": ends}, "changes": {"recall": change}}
    saved["seed"] = ends
    file.write_text(json.dumps(saved))
    assert run_row(tmp_path / "b", None)["result"].startswith("Preference accuracy: 60.0")
    assert compare(compose("task=compare", f"runs=[{tmp_path}/a,{tmp_path}/b]"), tmp_path)
