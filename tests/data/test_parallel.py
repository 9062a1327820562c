"""Rows prepared by several processes: the same rows, the same errors; and a second run, which prepares nothing."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import datasets
import pytest
from PIL import Image

from smolvlm_exp.data import parallel
from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.data.sources.files import Config
from smolvlm_exp.utils.errors import RequestError, RunError
from tests.conftest import compose

COUNT = 90


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "smolvlm_exp"


@pytest.fixture
def folder(tmp_path):
    """90 rows: images of several kinds and sizes, answers of several lengths, a control token, an image used twice."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = []
    for i in range(COUNT):
        name = f"{i % 80}.{('jpg', 'png', 'webp')[i % 80 % 3]}"
        mode = ("RGB", "L")[i % 80 % 2]
        Image.effect_noise((40 + i % 80, 700 if i == 7 else 60), 50).convert(mode).save(folder / name)
        question = "Is <image> a token?" if i == 5 else f"What is {i}?"
        rows.append({"image": name, "question": question, "chosen": "A cat. " * (i % 9 + 1), "rejected": "A dog."})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def contents(preferences):
    splits = preferences.train, preferences.test
    return [(rows.features, rows.with_format("arrow")[:].to_pylist()) for rows in splits]


@pytest.fixture
def load(folder, processor, tmp_path):
    return lambda **settings: load_preferences(
        Config(source="files", **{"folder": str(folder), **settings}), processor, tmp_path
    )


def test_a_cache_that_cannot_be_written_costs_only_time(load, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    told = contents(load())
    assert "cannot be written (Not a directory): rows are checked again in every run" in caplog.text
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert contents(load()) == told


def test_any_number_of_processes_gives_the_same_rows(load, cache, folder):
    made = []
    for count in (1, 2, 5):
        preferences = load(num_proc=count)
        made.append((contents(preferences), preferences.report, preferences.prints))
        shutil.rmtree(cache)
    assert made[1] == made[0]
    assert made[2] == made[0]
    assert sum(report["rows"] for report in made[0][1].values()) == COUNT


def test_any_number_of_processes_names_the_same_bad_rows(load, cache, folder):
    for i in (3, 40, 77):
        path = next(folder.glob(f"{i}.*"))
        path.write_bytes(path.read_bytes()[:-40])
    said = []
    for count in (1, 3):
        with pytest.raises(RequestError) as error:
            load(num_proc=count)
        said.append(str(error.value))
        shutil.rmtree(cache)
    assert said[0] == said[1]
    assert said[0].count("cannot be decoded") == 4  # row 83 has image 3 too


def test_a_second_run_opens_no_image_unless_one_changed(load, folder, monkeypatch):
    first = contents(load(num_proc=1))
    opened, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(1) or open_image(*args, **kwargs))
    assert contents(load(num_proc=1)) == first
    assert contents(load(num_proc=2)) == first  # nor do more processes make them anew
    assert not opened
    path = next(folder.glob("12.*"))
    size, stamp = path.stat().st_size, path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    Image.effect_noise((52, 60), 50).convert("RGB").save(path)
    os.utime(path, ns=(stamp, stamp + 1))
    changed = contents(load(num_proc=1))
    assert opened
    assert changed != first
    path.write_bytes(data)  # as it was, with its time
    os.utime(path, ns=(stamp, stamp))
    assert path.stat().st_size == size
    opened.clear()
    assert contents(load(num_proc=1)) == first
    assert opened  # that its time was set back does not hide that it was changed


@pytest.mark.parametrize("form", ["parquet", "imagefolder"])
def test_files_that_keep_their_times_are_read_again(processor, tmp_path, form):
    """As out of an archive of a later version: `datasets` goes by the time of their content alone."""
    folder, seen = tmp_path / "rows", []
    for version in ("a", "b"):
        rows = [{"question": "What?", "chosen": version, "rejected": "no"}] * 2
        for split in ("train", "test"):
            (folder / split).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), {"a": "red", "b": "blue"}[version]).save(folder / split / "0.bmp")
            image = {"bytes": (folder / split / "0.bmp").read_bytes(), "path": None}
            if form == "parquet":
                table = datasets.Dataset.from_list([{**row, "image": image} for row in rows])
                table.to_parquet(folder / f"{split}.parquet")
            else:
                lines = (json.dumps({"file_name": "0.bmp", **row}) + "\n" for row in rows)
                (folder / split / "metadata.jsonl").write_text("".join(lines))
        for path in folder.rglob("*"):
            os.utime(path, (1, 1))
        source = ("data=files", f"data.folder={folder}") if form == "parquet" else ("data=hub", f"data.id={folder}")
        read = load_preferences(compose(*source).data, processor, tmp_path)
        seen.append((read.train["chosen"][0][0]["content"][0]["text"], read.train["image_sha256"][0]))
    assert [text for text, _ in seen] == ["a", "b"]
    assert seen[0][1] != seen[1][1]


def test_a_cache_that_fills_or_was_cut_costs_only_time(load, cache, caplog):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        told = contents(load())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "cannot be written (" in caplog.text
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]  # nothing half-written is left
    assert contents(load()) == told
    for path in cache.glob("*.arrow"):
        os.truncate(path, path.stat().st_size // 2)
    assert contents(load()) == told


def test_another_process_has_the_same_keys(load, cache, folder, command):
    """Upstream's own differ between the process that has made the rows and the next one, which made them again."""
    load(num_proc=1)
    made = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.arrow")}
    code = (
        "import sys, datasets; from pathlib import Path; from tests.conftest import compose;"
        "from smolvlm_exp.data.preferences import load_preferences; from smolvlm_exp.data.sources.files import Config;"
        "from smolvlm_exp.models.model import load_processor;"
        "datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2]);"
        "load_preferences(Config(source='files', folder=sys.argv[1]), load_processor(compose().model), Path('.'))"
    )
    done = command("-c", code, str(folder), str(cache.parent))
    assert done.returncode == 0, done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("*.arrow")} == made


def test_a_killed_process_is_an_error_and_leaves_nothing(cache, tmp_path):
    rows = datasets.Dataset.from_dict({"n": range(100)})
    with pytest.raises(RunError, match=r"data\.num_proc=1"):
        parallel.map_rows(rows, lambda table: os._exit(9), rows.features, "key", 2, "rows")
    assert not list(cache.glob("*.arrow"))
    assert parallel.map_rows(rows, lambda table: table, rows.features, "key", 2, "rows")["n"][:] == list(range(100))


def test_ctrl_c_ends_all_processes_without_a_word_of_theirs(tmp_path):
    code = (
        "import time; from datasets import Dataset; from smolvlm_exp.data.parallel import map_rows\n"
        "rows = Dataset.from_dict({'n': range(1000)})\n"
        "def slow(table): print('working\\n', end='', flush=True); time.sleep(0.5); return table\n"
        "try: map_rows(rows, slow, rows.features, 'key', 3, 'rows', cached=False)\n"
        "except KeyboardInterrupt: print('stopped', flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    assert process.stdout.readline() == "working\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (out.splitlines()[-1], errors, process.returncode) == ("stopped", "", 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
