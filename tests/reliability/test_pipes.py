"""P3 and P12: a pipe or a device among somebody's files is refused: nothing waits for it, or reads it without end."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.evaluation.answer_changes import load_answers
from smolvlm_exp.evaluation.comparison import load_per_row
from smolvlm_exp.models.adapter import saved_adapter
from smolvlm_exp.models.model import load_model, load_processor
from smolvlm_exp.models.shape import EMBEDDED
from smolvlm_exp.runs.checkpoint import newest_intact
from smolvlm_exp.runs.find import summary_of
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose

PAIR = {"prompt": "What?", "chosen": "a", "rejected": "b"}


@pytest.fixture(autouse=True)
def patience():
    """A process that hangs in a library's own code does not hear Python's handlers: it ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60)
    yield
    signal.alarm(0)


def pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "chat_template.jinja"])
@pytest.mark.parametrize("load", [load_model, load_processor])
def test_in_a_models_folder(tmp_path, name, load):
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    pipe(folder / name)
    with pytest.raises(RequestError, match=f"{name} is a pipe or a device"):
        load(compose(f"model.id={folder}").model)


def test_in_an_adapters_folder(built, bench, tmp_path):
    adapter = shutil.copytree(newest_intact(built), tmp_path / "adapter")
    pipe(adapter / "base.json")
    with pytest.raises(RequestError, match=r"base\.json is a pipe or a device"):
        saved_adapter(bench.config().adapter, str(adapter), "embedded")


READERS = {"answers.jsonl": load_answers, "rows.safetensors": load_per_row, "summary.json": summary_of}


def test_in_a_run(tmp_path):
    for name, read in READERS.items():
        pipe(tmp_path / name)
        assert not read(tmp_path)


@pytest.mark.parametrize("name", ["train.jsonl", "train/state.json", "train/data-00000-of-00001.arrow"])
def test_among_rows(processor, tmp_path, name):
    data = tmp_path / "data"
    if "/" in name:
        Dataset.from_list([PAIR] * 2).save_to_disk(data / "train")
        (data / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    data.mkdir(exist_ok=True)
    pipe(data / name)
    config = compose("data=files", f"data.folder={data}").data
    with pytest.raises(RequestError, match=f"{Path(name).name} is (a pipe or a device|no file)"):
        load_preferences(config, processor, tmp_path)


def test_in_a_copy_of_a_repository(processor, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(f"{json.dumps(PAIR)}\n")
    pipe(data / "README.md")
    config = replace(compose("data=hub", f"data.id={data}").data)
    with pytest.raises(RequestError, match=r"README\.md is a pipe or a device"):
        load_preferences(config, processor, tmp_path)
