"""task=evaluate as people type it: a run, an adapter, a base, other data."""

import json
import os

import pytest
import torch

from smolvlm_exp.tasks.evaluate import evaluate
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.formatting import number
from tests.conftest import compose

QUICK = (
    "tracker=none", "data.train_rows=32", "data.test_rows=12", "trainer.max_steps=3", "trainer.warmup_steps=0",
    "trainer.learning_rate=3e-3", "trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=8",
    "trainer.save_strategy=no",
)  # fmt: skip
SAME = ("preference_accuracy", "reward_accuracy", "preference_margin", "chair_s", "recall", "wrong_image_drop")


@pytest.fixture(scope="module")
def run(tmp_path_factory, command_server):
    """A finished run, in the outputs/ of an empty folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    done = command_server.run(QUICK, folder, os.environ, timeout=240)
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "outputs").glob("*/*/summary.json")
    return made.parent


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_run_is_evaluated_as_it_evaluated_itself(command, run):
    sizes = "task.batch_sizes=[4,1,12]"
    offline = {"WANDB_MODE": "offline"}
    done = command(
        "task=evaluate", "run=last", sizes, "tracker=wandb", "hydra.run.dir=again", cwd=run.parents[2], env=offline
    )
    assert done.returncode == 0, done.stderr
    found, wanted = summary(run.parents[2] / "again"), summary(run)
    for part in ("before", "after"):
        for name in set(SAME) & set(wanted[part]):
            assert found[part][name] == pytest.approx(wanted[part][name], abs=1e-5), (part, name)
    assert found["changes"].keys() == wanted["changes"].keys()
    assert {check["verdict"] for check in found["checks"]} == {"ok"}
    for name in ("base", "tuned"):
        assert [each["batch_size"] for each in found["speed"][name]] == [1, 4, 12]
        assert all(each["first_token"] > 0 and each["tokens_per_second"] > 0 for each in found["speed"][name])
        assert f"{name}: batch size 12: first token after" in done.stdout
    (told,) = run.parents[2].glob("again/wandb/offline-run-*/files/media/table/checks*.table.json")
    columns = json.loads(told.read_text())
    assert [dict(zip(columns["columns"], row, strict=True)) for row in columns["data"]] == found["checks"]
    page = (run.parents[2] / "again" / "report.html").read_text()
    assert page.count('<th scope="row">tuned</th>') == 3
    assert number(found["speed"]["tuned"][2]["tokens_per_second"]) in page


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


@pytest.mark.slow
def test_an_adapter_folder_and_a_merged_model_say_what_the_run_says(command, run):
    merged = run / "export" / "merged"
    done = command("task=export", f"run={run}", "export.format=merged", cwd=run.parents[2])
    assert (done.returncode, merged.is_dir()) == (0, True), done.stderr
    asked = {
        "adapter": ("after", [f"model.adapter={run}/adapter"]),
        "merged": ("before", [f"model.id={merged}", "model.weights=pretrained", "quant=none"]),
    }
    for name, (part, which) in asked.items():
        done = command("task=evaluate", *QUICK, *which, f"hydra.run.dir={name}", cwd=run.parents[2])
        assert done.returncode == 0, done.stderr
        found = summary(run.parents[2] / name)
        assert bool(found["after"]) == (name == "adapter")
        for key in ("preference_accuracy", "chair_s", "chair_i", "recall", "yes_no_f1", "wrong_image_drop"):
            assert found[part][key] == pytest.approx(summary(run)["after"][key], abs=1e-4), (name, key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=last"], "run=last is what another task works on: add task=evaluate"),
        (["task=evaluate", "run=nowhere"], "run=nowhere: not a run folder"),
        (["task=evaluate", "task.batch_sizes=[0,4]"], "task.batch_sizes=[0, 4]: 1 is the least"),
    ],
)
def test_what_cannot_be_evaluated(command, arguments, message):
    done = command(*arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_speed_is_by_hand(monkeypatch):
    """Two answers, 0.5 s to the first token, 0.1 s a token: 2 x 31 tokens in 3.1 s; slow first calls are not timed."""
    from types import SimpleNamespace

    from smolvlm_exp.evaluation import generate as speed

    clock, calls = [0.0], []

    def generate(max_new_tokens, **kwargs):
        calls.append((max_new_tokens, kwargs["min_new_tokens"]))
        warm = calls.count(calls[-1]) > 1
        clock[0] += 0.5 + 0.1 * (max_new_tokens - 1) + (0 if warm else 7)

    model = SimpleNamespace(device=torch.device("cpu"), generate=generate)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    found = speed.batch_speed(model, {}, 2)
    assert found == speed.Speed(2, pytest.approx(0.5), pytest.approx(2 * 31 / 3.1), None)
    assert calls == [(1, 1), (1, 1), (32, 32), (32, 32)]


def test_an_adapter_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match=r"model\.adapter=nowhere: there is no adapter_config\.json"):
        evaluate(compose("task=evaluate", "model.adapter=nowhere"), tmp_path)


def test_a_run_without_its_end(command, tmp_path):
    (tmp_path / "outputs").mkdir()
    done = command("task=evaluate", "run=last")
    assert (done.returncode, "no run under outputs/ has finished yet" in done.stderr) == (2, True)
