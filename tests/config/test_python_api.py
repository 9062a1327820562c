"""`from smolvlm_exp import train, evaluate`: what a notebook does."""

import json
import re
from pathlib import Path

import pytest

import smolvlm_exp
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
