"""task=runs: one row per run, from its folder."""

import json

import pytest
import yaml
from filelock import FileLock

from smolvlm_exp.config.previous_run import complete_overrides
from smolvlm_exp.runs.checkpoint import MANIFEST
from smolvlm_exp.runs.find import find_finished_run
from smolvlm_exp.tasks.runs import runs
from smolvlm_exp.tasks.time_estimate import estimate_time
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose

MEASURED = {"seconds": 5, "pairs_per_second": 2}


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def made(name, summary=None, step=None, task="train"):
        folder = tmp_path / "outputs" / name
        (folder / ".hydra").mkdir(parents=True)
        choices = {"model": "tiny", "data": "shapes", "quant": "nf4", "adapter": "dora", "trainer": "rpo"}
        hydra = {"hydra": {"runtime": {"choices": choices, "config_sources": []}}}
        (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"task": {"name": task}}))
        if summary:
            (folder / "summary.json").write_text(json.dumps(summary))
        if step:
            checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / MANIFEST).write_text("{}")
        return folder

    return made


def rows():
    return {row["run"].removeprefix("outputs/"): row for row in runs(compose("task=runs"), None)}


def test_model_data_result_and_state(make, capsys):
    metrics = {"before": {"preference_accuracy": 0.5}, "after": {"preference_accuracy": 0.75}}
    chance = {"changes": {"preference_accuracy": {"low": -0.1, "high": 0.6}}}
    make("2026-11-30/10-00-00", {"status": "done", "held_out_rows": 240, **metrics})
    make("2026-11-30/11-00-00", {"status": "done", "held_out_rows": 240, **metrics, **chance})
    make("few", {"status": "done", "held_out_rows": 8, **metrics})
    make("stopped", {"status": "stopped"}, step=40)
    make("killed", step=20)
    make("never")
    make("sweeps/2026-11-30/12-00-00/0", {"status": "failed"})
    make("asked", {"status": "done"}, task="evaluate")
    make("shown", task="preview")  # no summary.json, however it ended
    (make("damaged") / ".hydra" / "config.yaml").write_text("{")
    running = make("running")
    with FileLock(running / ".lock"):
        found = rows()
    assert found["2026-11-30/10-00-00"] == {
        "run": "outputs/2026-11-30/10-00-00", "task": "train", "model": "tiny", "data": "shapes",
        "trained": "nf4 dora rpo", "state": "done",
        "result": "Preference accuracy: 50.0\u00a0% → 75.0\u00a0% on 240 rows",
    }  # fmt: skip
    assert found["2026-11-30/11-00-00"]["result"].endswith("on 240 rows (no gain over before)")
    assert found["few"]["result"].endswith("on 8 rows (too few to tell)")
    states = {name: row["state"] for name, row in found.items()}
    assert {name: states[name] for name in ("stopped", "killed", "never", "damaged", "running", "shown")} == {
        "stopped": "stopped at step 40", "killed": "killed at step 20", "never": "killed", "damaged": "damaged",
        "running": "running", "shown": "ended",
    }  # fmt: skip
    assert states["sweeps/2026-11-30/12-00-00/0"] == "failed"
    assert (found["asked"]["task"], found["asked"]["trained"]) == ("evaluate", "")
    assert "│ outputs/2026-11-30/10-00-00" in capsys.readouterr().out


def test_a_run_without_a_model_is_no_run_to_go_on_from(make):
    folders = [make("shown", task="preview"), make("mined", {"status": "done"}, task="mine"), make("killed", step=1)]
    wrong = ["is of task=preview, which trains nothing", "is of task=mine, which trains nothing", "it has not finished"]
    for folder, said in zip(folders, wrong, strict=True):
        with pytest.raises(RequestError, match=said):
            find_finished_run(str(folder))


def test_there_may_be_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert rows() == {}
    assert capsys.readouterr().out == "no run under outputs/ yet\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config", "[1]"), ("config", "task: 3"), ("config", "[" * 5000), ("hydra", "[1]"), ("hydra", "hydra: {}"),
        ("overrides", "5"), ("overrides", "[1, null]"), ("overrides", "{a: 1}"),
    ],
)  # fmt: skip
def test_settings_in_another_form_are_damaged_for_all_that_read_them(make, file, text):
    folder = make("run", {"status": "done", "held_out_rows": "many", "seconds": 9, "train": MEASURED}, step=1)
    (folder / ".hydra" / f"{file}.yaml").write_text(text)
    with pytest.raises(RequestError, match=rf"{file}.yaml is damaged \("):
        complete_overrides([f"resume={folder}", "trainer.max_steps=3"], multirun=False)
    if file != "overrides":  # which the table does not read
        assert rows()["run"]["state"] == "damaged"
    assert estimate_time(folder / "sweep", [compose()]) is None  # and another run begins


def test_a_run_whose_origin_is_gone_or_is_itself(make):
    folders = {name: make(name, step=1) for name in ("again", "other")}
    for name, origin in (("again", "gone"), ("other", "again"), ("again", "other")):
        source = {"provider": "main", "path": str(folders["again"].with_name(origin) / ".hydra")}
        hydra = {"hydra": {"runtime": {"choices": {}, "config_sources": [source]}}}
        (folders[name] / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
        message = "gone/.hydra/hydra.yaml is missing" if origin == "gone" else "replays itself"
        if name == "again":
            with pytest.raises(RequestError, match=message):
                complete_overrides([f"resume={folders[name]}"], multirun=False)
    assert rows()["again"]["state"] == "damaged"


def test_brackets_in_a_name_are_no_markup(make, capsys):
    make("a[red]b", {"status": "done", "held_out_rows": "many", "after": {"preference_accuracy": 0.5}})
    make("[")
    assert rows()["a[red]b"]["result"] == "Preference accuracy: 50.0\u00a0%"
    assert "│ outputs/a[red]b │" in capsys.readouterr().out
