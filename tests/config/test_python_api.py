"""`from smolvlm_exp import train, evaluate`: what a notebook does."""

import errno
import io
import json
import os
import re
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

import smolvlm_exp
from smolvlm_exp.data.images import to_rgb
from smolvlm_exp.data.loading import load_saved
from smolvlm_exp.data.memory import save_rows
from smolvlm_exp.training.callbacks import StopCallback
from smolvlm_exp.utils.errors import RequestError, RunError

ROOT = Path(__file__).parents[2]
SMALL = (
    '"tracker=none", "data.train_rows=16", "data.test_rows=4", "trainer.sample_steps=0", "task.max_new_tokens=4", '
    '"trainer.per_device_train_batch_size=4", '
)


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
    "data.train_rows=16", "data.test_rows=4", "trainer.sample_steps=0", "task.max_new_tokens=4", "adapter=lora",
    "quant=none", "trainer.warmup_steps=0", "trainer.per_device_train_batch_size=4",
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
    assert (
        len({save_rows(rows, None), save_rows(None, rows), save_rows(rows, rows)}) == 3
    )  # to train on, to evaluate on
    (spoilt := next(stored.rglob("*.arrow"))).write_bytes(b"")
    assert save_rows(rows, rows[1:]) == stored
    assert spoilt.stat().st_size
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


def test_an_image_is_stored_as_it_is_in_memory(tmp_path, monkeypatch):
    """Not as the file that it was read from, which `datasets` would store."""
    monkeypatch.chdir(tmp_path)
    drawn = Image.new("RGB", (60, 40), "red")
    exif = drawn.getexif()
    exif[0x0112] = 6  # it is to be turned
    drawn.save("red.jpg", exif=exif)
    changed, turned = Image.open("red.jpg"), Image.open(io.BytesIO(Path("red.jpg").read_bytes()))
    changed.paste("blue", (0, 0, 60, 40))
    with Image.open("red.jpg") as closed:
        pass
    rows = [{"image": image} for image in (changed, turned, Image.open("red.jpg"), closed)]
    stored = [row["images"][0] for row in load_saved(save_rows(rows, None))["train"]]
    assert [to_rgb(image).size for image in stored] == [(40, 60)] * 4
    assert [to_rgb(image).getpixel((5, 5))[0] > 200 for image in stored] == [False, True, True, True]


def test_a_full_disk_for_rows_is_one_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(DatasetDict, "save_to_disk", Mock(side_effect=full))
    with pytest.raises(RunError, match="no space left in outputs"):
        smolvlm_exp.train(rows=[{"image": Image.new("RGB", (9, 9))}])


@pytest.mark.parametrize(
    "rows",
    [
        [{"image": "gone.png"}], [{"image": 3}], [{"question": object()}], ["no row"],
        Dataset.from_list([{"question": "Which?"}]).with_transform(lambda rows: rows),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_stored(tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RequestError, match=r"an image cannot be read|the train rows (cannot be stored|have a transform)"
    ):
        smolvlm_exp.train(rows=rows)
