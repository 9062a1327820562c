"""task=evaluate as people type it: a run, an adapter, a base, other data."""

import json

import pytest

from smolvlm_exp.errors import RequestError
from smolvlm_exp.evaluate import evaluate
from tests.conftest import compose

QUICK = (
    "tracker=none", "data.train_rows=32", "data.test_rows=12", "trainer.max_steps=3", "trainer.warmup_steps=0",
    "trainer.learning_rate=3e-3", "trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=8",
    "trainer.save_strategy=no",
)  # fmt: skip
SAME = ("preference_accuracy", "reward_accuracy", "preference_margin", "chair_s", "recall", "wrong_image_drop")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, in the outputs/ of an empty folder."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("evaluate")
    done = subprocess.run(
        [sys.executable, "-m", "smolvlm_exp", *QUICK], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "outputs").glob("*/*/summary.json")
    return made.parent


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_is_evaluated_as_it_evaluated_itself(command, run):
    done = command("task=evaluate", "run=last", "hydra.run.dir=again", cwd=run.parents[2])
    assert done.returncode == 0, done.stderr
    found, wanted = summary(run.parents[2] / "again"), summary(run)
    for part in ("before", "after"):
        for name in set(SAME) & set(wanted[part]):
            assert found[part][name] == pytest.approx(wanted[part][name], abs=1e-5), (part, name)
    assert found["changes"].keys() == wanted["changes"].keys()
    assert {check["verdict"] for check in found["checks"]} == {"ok"}
    assert found["speed"]["tuned"][0]["tokens_per_second"] > 0
    assert "8 at a time: first token after" in done.stdout
    assert (run.parents[2] / "again" / "report.html").is_file()


@pytest.mark.slow
def test_other_data_and_the_base_alone(command, run):
    done = command("task=evaluate", f"run={run}", "data=photos", "hydra.run.dir=photos", cwd=run.parents[2])
    assert done.returncode == 0, done.stderr
    found = summary(run.parents[2] / "photos")
    assert "chair_s" not in found["after"]  # no truth is known
    assert 0 <= found["after"]["preference_accuracy"] <= 1
    done = command("task=evaluate", *QUICK, "task.temperature=1.0", "hydra.run.dir=base", cwd=run.parents[2])
    assert done.returncode == 0, done.stderr
    base = summary(run.parents[2] / "base")
    assert base["after"] == {}
    assert base["before"]["preference_accuracy"] == pytest.approx(summary(run)["before"]["preference_accuracy"])
    low, high = base["intervals"]["before"]["preference_accuracy"]
    assert low <= base["before"]["preference_accuracy"] <= high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=last"], "run=last is what another task works on: add task=evaluate"),
        (["task=evaluate", "run=nowhere"], "run=nowhere: that is no run folder"),
    ],
)
def test_what_cannot_be_evaluated(command, arguments, message):
    done = command(*arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_an_adapter_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match=r"model\.adapter=nowhere: there is no adapter_config\.json"):
        evaluate(compose("task=evaluate", "model.adapter=nowhere"), tmp_path)


def test_a_run_without_its_end(command, tmp_path):
    (tmp_path / "outputs").mkdir()
    done = command("task=evaluate", "run=last")
    assert (done.returncode, "no run under outputs/ is at its end yet" in done.stderr) == (2, True)
