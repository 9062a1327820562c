"""task=runs: one row per run, from its folder."""

import json

import pytest
import yaml
from filelock import FileLock

from smolvlm_exp.runs.checkpoint import MANIFEST
from smolvlm_exp.tasks.runs import runs
from tests.conftest import compose


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
    assert {name: states[name] for name in ("stopped", "killed", "never", "damaged", "running")} == {
        "stopped": "stopped at step 40", "killed": "killed at step 20", "never": "killed", "damaged": "damaged",
        "running": "running",
    }  # fmt: skip
    assert states["sweeps/2026-11-30/12-00-00/0"] == "failed"
    assert (found["asked"]["task"], found["asked"]["trained"]) == ("evaluate", "")
    assert "│ outputs/2026-11-30/10-00-00" in capsys.readouterr().out


def test_there_may_be_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert rows() == {}
    assert capsys.readouterr().out == "no run under outputs/ yet\n"
    assert not list(tmp_path.iterdir())
