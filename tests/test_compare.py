"""task=compare: runs grouped by what they differ in, and what of it is luck."""

import csv
import json
import re

import pytest
import yaml

from smolvlm_exp.compare import Run, compare, comparison
from smolvlm_exp.errors import RequestError
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


METRIC = "after.preference_accuracy"


def test_seeds_are_one_group_and_its_interval_is_students():
    found = comparison([of(0.80, 0), of(0.82, 1), of(0.84, 2), of(0.6, rate=1e-5)], METRIC)
    assert found.keys == ["trainer.learning_rate"]
    best, other = found.groups
    assert best.value(METRIC) == pytest.approx(0.82)
    assert best.error(METRIC) == pytest.approx(4.303 * 0.02 / 3**0.5, abs=1e-4)  # t with 2 degrees of freedom
    assert other.error(METRIC) == pytest.approx(0.05)  # one run: what it measured itself
    assert (found.verdict(best), found.verdict(other)) == ("best", "worse")


def test_a_difference_within_both_intervals_is_luck():
    found = comparison([of(0.80, rate=1e-4), of(0.75, rate=1e-5)], METRIC)  # 0.05 < sqrt(2) 0.05
    assert found.verdict(found.groups[1]) == "within the noise"
    found = comparison([of(0.80, rate=1e-4), of(0.72, rate=1e-5)], METRIC)
    assert found.verdict(found.groups[1]) == "worse"


def test_less_is_better_where_it_is():
    runs = [Run(None, {"r": str(r)}, {"after": {"chair_s": value}}) for r, value in ((4, 0.5), (8, 0.1), (16, 0.3))]
    assert [group.settings["r"] for group in comparison(runs, "after.chair_s").groups] == ["8", "16", "4"]


def test_folders_a_pattern_and_a_sweep(command, tmp_path):
    run(tmp_path / "outputs" / "day" / "a", 0.9)
    run(tmp_path / "outputs" / "day" / "b", 0.6, rate=1e-5)
    run(tmp_path / "elsewhere", 0.7, rate=1e-3, interval=0.3, seed=3)
    done = command("task=compare", "runs=[outputs/day/*,elsewhere]", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert [row["run"] for row in rows] == ["outputs/day/a", "elsewhere", "outputs/day/b"]
    assert [row["group"] for row in rows] == ["best", "within the noise", "worse"]
    assert [float(row["group after.preference_accuracy +-"]) for row in rows] == pytest.approx([0.05, 0.3, 0.05])
    assert [row["seed"] for row in rows] == ["0", "3", "0"]
    (table,) = tmp_path.glob("out/wandb/offline-run-*/files/media/table/compare*.table.json")
    told = json.loads(table.read_text())
    assert [dict(zip(told["columns"], row, strict=True))["group"] for row in told["data"]] == [r["group"] for r in rows]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "90.0\u00a0% ± 5.0" in page
    assert len(re.findall(r"learning_rate=0\.0001", page)) >= 2  # a line of the chart, and its folder
    assert "90.0" in done.stdout
    done = command("task=compare", "runs=[outputs/day]", "metric=after.recall", "tracker=none", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("named", "message"),
    [("[]", "needs two finished runs or more"), ("[nowhere]", "runs: nowhere names no finished run"),
     ("[last]", "sweep=last: there is no sweep")],
)  # fmt: skip
def test_what_cannot_be_compared(tmp_path, monkeypatch, named, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=re.escape(message)):
        compare(compose("task=compare", f"runs={named}"), tmp_path)
