"""Entries on disk are complete, made once, read again, and never larger than allowed."""

import multiprocessing
import os
import pickle
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from smolvlm_exp.engine import disk_cache as module
from smolvlm_exp.engine.disk_cache import DiskCache, MappedTensor, cache_key

LAYOUT = {"numbers": (torch.float32, (3, 5)), "bytes": (torch.uint8, (7,)), "halves": (torch.bfloat16, (2, 2))}
SEVEN = {"bytes": (torch.uint8, (7,))}
PLENTY = 2**40


@pytest.fixture
def store(tmp_path):
    return DiskCache(tmp_path / "cache", PLENTY)


def fill(tensors):
    tensors["numbers"][:] = torch.arange(15.0).view(3, 5)
    tensors["bytes"][:] = 7
    tensors["halves"][0] = 0.5


def no_fill(tensors):
    raise AssertionError("there was no need")


def test_an_entry_is_stored_as_plain_safetensors_and_read_again(store):
    made = store.get("thing-1", LAYOUT, fill, {"rows": 3})
    tensors = load_file(store.file("thing-1"))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == LAYOUT
    for entry in (made, store.get("thing-1", LAYOUT, no_fill), tensors):
        assert torch.equal(entry["numbers"][:], torch.arange(15.0).view(3, 5))
        assert entry["bytes"][2:4].tolist() == [7, 7]
        assert entry["halves"][:].tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert '"rows": 3' in (store.folder / "thing-1" / "manifest.json").read_text()
    made["bytes"][:].fill_(9)  # a reader cannot change the file
    assert store.get("thing-1", LAYOUT, no_fill)["bytes"][:].tolist() == [7] * 7


def test_a_mapped_tensor_is_pickled_as_a_path(store):
    entry = store.get("big-1", {"bytes": (torch.uint8, (10**6,))}, lambda tensors: tensors["bytes"].fill_(3))
    sent = pickle.dumps(entry["bytes"])
    assert len(sent) < 1000
    assert pickle.loads(sent)[999_999:].tolist() == [3]


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(path.read_bytes()[:-3] + b"\x01" + path.read_bytes()[-2:]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.with_name("manifest.json").write_text("{"),
        lambda path: path.with_name("manifest.json").unlink(),
    ],
    ids=["truncated", "bit flipped", "emptied", "lost", "manifest cut", "manifest lost"],
)
def test_a_damaged_entry_is_recomputed_with_a_message(store, harm, capsys):
    store.get("thing-1", LAYOUT, fill)
    harm(store.file("thing-1"))
    assert store.get("thing-1", LAYOUT, fill)["bytes"][:].tolist() == [7] * 7
    assert re.search(r"thing-1 is damaged \(.+\); removing and recomputing it", capsys.readouterr().out)
    store.get("thing-1", LAYOUT, no_fill)


def test_damage_in_a_later_block_is_found(store, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1000)
    layout = {"bytes": (torch.uint8, (10_000,))}
    store.get("thing-1", layout, lambda tensors: tensors["bytes"].fill_(3))
    with store.file("thing-1").open("r+b") as file:
        file.seek(7777)
        file.write(b"\x02")
    store.get("thing-1", layout, lambda tensors: tensors["bytes"].fill_(4))
    assert store.get("thing-1", layout, no_fill)["bytes"][:].tolist() == [4] * 10_000


def test_a_failure_while_making_leaves_nothing(store):
    def fails(tensors):
        tensors["bytes"][:] = 1
        raise KeyError("half way")

    with pytest.raises(KeyError, match="half way"):
        store.get("thing-1", LAYOUT, fails)
    assert [path.name for path in store.folder.iterdir() if not path.name.endswith(".lock")] == []
    assert store.get("thing-1", LAYOUT, fill)["bytes"][:].tolist() == [7] * 7


def test_a_killed_maker_leaves_nothing_that_is_taken_for_complete(store):
    context = multiprocessing.get_context("fork")
    started = context.Event()

    def never_ends(tensors):
        tensors["bytes"][:] = 1
        started.set()
        time.sleep(60)

    maker = context.Process(target=store.get, args=("thing-1", SEVEN, never_ends))
    maker.start()
    assert started.wait(60)
    assert (store.folder / ".thing-1.part").exists()
    maker.kill()
    maker.join()
    entry = store.get("thing-1", SEVEN, lambda tensors: tensors["bytes"][1:].fill_(2))
    assert entry["bytes"][:].tolist() == [0, 2, 2, 2, 2, 2, 2]
    assert not (store.folder / ".thing-1.part").exists()


def test_of_several_runs_at_once_one_makes_the_entry(store, tmp_path):
    context, makers = multiprocessing.get_context("fork"), tmp_path / "makers"

    def slow(tensors):
        with makers.open("a") as file:
            file.write("made\n")
        time.sleep(0.5)
        tensors["bytes"][:] = 5

    def run():
        assert store.get("thing-1", SEVEN, slow)["bytes"][:].tolist() == [5] * 7

    runs = [context.Process(target=run) for _ in range(3)]
    for process in runs:
        process.start()
    for process in runs:
        process.join(60)
    assert [process.exitcode for process in runs] == [0, 0, 0]
    assert makers.read_text() == "made\n"


def test_entries_stay_within_the_budget(tmp_path, capsys):
    store = DiskCache(tmp_path / "cache", 30_000)
    layout = {"bytes": (torch.uint8, (20_000,))}
    assert store.get("thing-1", layout, lambda _: None) is not None
    assert store.get("thing-2", layout, no_fill) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "0.0 MiB needed, trainer.cache_disk allows 0.0 MiB, of which 0.0 MiB are used; recomputing" in line
    assert store.get("thing-1", layout, no_fill) is not None


def test_a_full_disk_is_one_message(store, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert store.get("thing-1", LAYOUT, no_fill) is None
    assert "No space left on device; recomputing each time" in capsys.readouterr().out
    monkeypatch.setattr(module, "SPARE", 2**60)
    assert store.get("thing-1", LAYOUT, no_fill) is None
    assert "0.0 MiB needed, the disk has" in capsys.readouterr().out
    assert not list(store.folder.glob("*thing-1*.part"))


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file stands where the folder should")
    assert DiskCache(tmp_path / "cache", PLENTY).get("thing-1", LAYOUT, no_fill) is None
    assert "cache: thing: not stored in" in capsys.readouterr().out


def test_a_tensor_is_in_ram_else_on_disk_else_nowhere(tmp_path, capsys):
    def tensor(disk, ram):
        store, spec = DiskCache(tmp_path / "cache", disk, ram), (torch.uint8, (7,))
        return store.tensor("things", "3 rows", spec, lambda cached: cached.fill_(4), {"rows": 3})

    assert isinstance(tensor(disk=0, ram=7), torch.Tensor)
    assert not (tmp_path / "cache").exists()
    assert "things of 3 rows: 0.0 MiB in RAM, " in capsys.readouterr().out
    mapped = tensor(disk=PLENTY, ram=6)
    assert isinstance(mapped, MappedTensor)
    assert mapped[:].tolist() == [4] * 7
    shutil.rmtree(tmp_path / "cache")
    assert tensor(disk=6, ram=6) is None


def test_keys_follow_every_part_in_any_order():
    parts = {"rows": [1, 2], "dtype": "float32", "none": None}
    assert cache_key("thing", **dict(reversed(parts.items()))) == cache_key("thing", **parts)
    assert cache_key("thing", **{**parts, "none": 0}) != cache_key("thing", **parts)
