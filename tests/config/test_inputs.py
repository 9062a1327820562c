"""Missing folders, empty images and wrong runs are refused before torch is imported, and leave nothing behind."""

import json
import os
import resource
import subprocess
import sys

import pytest
from PIL import Image

from smolvlm_exp.config.inputs import check_inputs
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose

WRONG = [
    (["data=files", "data.folder=gone"], "data.folder=gone: there is no such folder."),
    (["data=files", "data.folder=empty"], "data.folder=empty holds no .jsonl, .json, .csv, .parquet file"),
    (["data=files", "data.folder=rows"], "pairs.jsonl line 2: the image b.png is an empty file."),
    (["data=files", "data.folder=rows", "data.rows=x.csv"], "data.rows=x.csv: there is no such file in rows."),
    (["task=evaluate", "data=pope", "data.questions=gone", "data.images=rows"], "data.questions=gone: there is no s"),
    (["task=evaluate", "data=pope", "data.questions=rows/pairs.jsonl", "data.images=x"], "data.images=x: there is no"),
    (["task=evaluate", "data=amber", "data.folder=rows", "data.images=x"], "data.images=x: there is no such folder."),
    (["task=generate"], "task=generate needs images: task.images=FOLDER"),
    (["task=generate", "task.images=gone"], "task.images=gone: there is no such folder."),
    (["task=generate", "task.images=empty"], "task.images=empty: no image is there"),
    (["task=generate", "task.images=hollow"], "task.images=hollow: all 1 images are empty files."),
    (["task=generate", "task.questions=gone.jsonl"], "task.questions=gone.jsonl: there is no such file."),
    (["reward.user=mine.py:f"], "reward.user: this trainer learns from pairs and calls no reward. Add trainer=grpo"),
    (["model.adapter=rows"], "model.adapter=rows: there is no adapter_config.json in it or in its adapter/."),
    (["model.id=./gone"], "model.id=./gone: there is no such folder, and it is no name of the Hub (OWNER/NAME)."),
]
RIGHT = [
    [],
    ["data=files", "data.folder=rows", "data.on_bad_row=skip"],  # the bad row is left out
    ["task=plan", "data=files", "data.folder=gone"],  # says it itself
    ["task=generate", "task.images=rows"],
    ["model=smolvlm"],
    ["trainer=grpo", "reward.user=mine.py:f"],
    ["task=mine", "reward.user=mine.py:f"],
    ["task=doctor", "model.id=./gone"],
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "rows", "hollow"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save("rows/a.png")
    for name in ("rows/b.png", "hollow/c.png"):
        (tmp_path / name).touch()
    pair = {"question": "What?", "chosen": "A.", "rejected": "B."}
    lines = [json.dumps({"image": name, **pair}) for name in ("a.png", "b.png")]
    (tmp_path / "rows" / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("overrides", "said"), WRONG)
def test_what_is_not_there_is_refused(overrides, said):
    with pytest.raises(RequestError) as refusal:
        check_inputs(compose(*overrides))
    assert str(refusal.value).startswith(said)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("overrides", RIGHT)
def test_what_is_there_is_not(overrides):
    check_inputs(compose(*overrides))


def test_within_seconds_without_torch_and_without_a_folder(here):
    """By the command itself; a torch that cannot be imported tells that nobody tried."""
    (here / "torch.py").write_text("raise SystemExit('torch was imported')")
    before = sorted(here.rglob("*"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    for overrides, said in (WRONG[0], WRONG[2], WRONG[-1], (["task=chat", "run=rows"], "run=rows: not a run folder")):
        start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # other tests may be running
        done = subprocess.run(
            [sys.executable, "-B", "-m", "smolvlm_exp", *overrides], capture_output=True, text=True, env=env
        )
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 5
        assert done.stderr.startswith(f"smolvlm_exp: {said}")
        assert done.returncode == 2
    assert sorted(here.rglob("*")) == before


def test_refused_later_or_without_results_a_command_leaves_no_folder(command, tmp_path):
    """Chat and serve write nothing; what is refused once torch is there takes its folder along."""
    done = command("task=chat")
    assert (done.returncode, done.stderr) == (0, "")
    assert "model: embedded, the untuned base; for a tuned one: task=chat run=last, or run=FOLDER" in done.stdout
    for refused in (["task=compare", "runs=[x,y]"], ["adapter=none"], ["task=serve", "serve.host=nowhere.invalid"]):
        done = command(*refused)
        assert done.returncode == 2, done.stderr
    assert not list(tmp_path.iterdir())
