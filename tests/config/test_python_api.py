"""`from smolvlm_exp import train, evaluate`: what a notebook does."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

import smolvlm_exp
from smolvlm_exp.data.memory import save_rows
from smolvlm_exp.training.callbacks import StopCallback
from smolvlm_exp.utils.errors import RequestError

ROOT = Path(__file__).parents[2]
SMALL = '"tracker=none", "data.train_rows=32", "data.test_rows=8", "trainer.sample_steps=0", "task.max_new_tokens=16", '


def test_the_example_in_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("smolvlm_exp.evaluation.generate.TIMED_TOKENS", 4)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "notebook.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    names: dict = {}
    exec(code.replace('"tracker=none", ', SMALL, 1).replace("data.test_rows=16", "data.test_rows=4"), names)
    run, again = names["run"], names["again"]
    assert json.loads((run.folder / "summary.json").read_text())["after"] == run.summary["after"]
    assert run.summary["train"]["steps"] == 5
    assert again.folder != run.folder
    assert again.summary["after"]
    assert (run.folder / ".hydra" / "config.yaml").is_file()
    with pytest.raises(RequestError, match="already holds a run"):
        smolvlm_exp.train([f"hydra.run.dir={run.folder}"])


def test_a_mistake_raises_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"Did you mean adapter\.r\?"):
        smolvlm_exp.train(["adapter.rr=4"])
    with pytest.raises(RequestError, match="resumes a sweep: add -m"):
        smolvlm_exp.train(["sweep=last"])
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = smolvlm_exp.trian
    assert not list(tmp_path.iterdir())


FEW = (
    "data.train_rows=32", "data.test_rows=8", "trainer.sample_steps=0", "task.max_new_tokens=8", "adapter=lora",
    "quant=none", "trainer.warmup_steps=0",
)  # fmt: skip


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """All its cells, with fewer rows and steps, but those that install and those for a GPU."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "first_run.ipynb").read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code" and not cell["metadata"]]
    names: dict = {}
    for code in codes:
        few = repr([*(FEW if "rows=rows" not in code else FEW[2:]), "trainer.max_steps=2"])
        exec(re.sub(r"train\(\[(.*?)\]", rf"train([\1, *{few}]", code), names)
    run, own, other = names["run"], names["own"], names["other"]
    assert run.report.is_file()
    assert own.summary["data"]["train"]["rows"] + own.summary["data"]["test"]["rows"] == len(names["rows"])
    assert "adapter.r" in (tmp_path / "outputs").rglob("compare.csv").__next__().read_text()
    assert other.folder != run.folder
    assert capsys.readouterr().out.strip().splitlines()[-1], "an answer"


def test_rows_in_memory_are_stored_once_and_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "red").save("red.png")
    given = {"question": "Which?", "chosen": "This.", "rejected": "That."}
    rows = [{**given, "image": "red.png"}, {**given, "images": [Image.new("RGB", (50, 40), "blue")]}]
    stored = save_rows(rows, Dataset.from_list(rows[1:]).select([0]))
    assert save_rows(rows, rows[1:]) == stored
    overrides = ["tracker=none", *FEW[2:], "trainer.max_steps=2", "trainer.save_steps=1", "trainer.logging_steps=1"]
    monkeypatch.setattr(StopCallback, "on_step_end", stop_after_one(StopCallback.on_step_end))
    stopped = smolvlm_exp.train(overrides, rows=rows, test_rows=rows[1:])
    assert stopped.summary["status"] == "stopped"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    ended = smolvlm_exp.train([f"resume={stopped.folder}"])
    assert (ended.summary["status"], ended.summary["train"]["steps"]) == ("done", 2)


def stop_after_one(on_step_end):
    """A kernel's interrupt during the first step."""

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return on_step_end(self, args, state, control, **kwargs)

    return interrupt


@pytest.mark.parametrize("rows", [[{"image": "gone.png"}], [{"image": 3}], [{"question": object()}]])
def test_rows_that_cannot_be_stored(tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"an image cannot be read|the train rows cannot be stored"):
        smolvlm_exp.train(rows=rows)
