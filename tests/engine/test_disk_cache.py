"""What is kept on disk is whole, made once, found again, and never more than was allowed."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from smolvlm_exp.engine import disk_cache as module
from smolvlm_exp.engine.disk_cache import DiskCache, MappedTensor, cache_key, cached_tensors

LAYOUT = {"numbers": (torch.float32, (3, 5)), "bytes": (torch.uint8, (7,)), "halves": (torch.bfloat16, (2, 2))}
PLENTY = 2**40


@pytest.fixture
def store(tmp_path):
    return DiskCache(tmp_path / "cache", PLENTY)


def fill(tensors, rank, processes):
    tensors["numbers"][:] = torch.arange(15.0).view(3, 5)
    tensors["bytes"][:] = 7
    tensors["halves"][0] = 0.5


def no_fill(tensors, rank, processes):
    raise AssertionError("it was there already")


def test_kept_and_found_again(store):
    made = store.get("thing-1", LAYOUT, fill, {"rows": 3})
    found = store.get("thing-1", LAYOUT, no_fill)
    for kept in (made, found):
        assert torch.equal(kept["numbers"][:], torch.arange(15.0).view(3, 5))
        assert kept["bytes"][2:4].tolist() == [7, 7]
        assert kept["halves"][:].tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert '"rows": 3' in (store.folder / "thing-1" / "manifest.json").read_text()


def test_the_file_is_plain_safetensors(store):
    store.get("thing-1", LAYOUT, fill)
    tensors = load_file(store.file("thing-1"))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == LAYOUT
    assert torch.equal(tensors["numbers"], torch.arange(15.0).view(3, 5))


def test_a_reader_cannot_change_the_file(store):
    store.get("thing-1", LAYOUT, fill)["bytes"][:].fill_(9)
    assert store.get("thing-1", LAYOUT, no_fill)["bytes"][:].tolist() == [7] * 7


def test_mapped_travels_as_a_path(store):
    kept = store.get("big-1", {"bytes": (torch.uint8, (10**6,))}, lambda tensors, *_: tensors["bytes"].fill_(3))
    sent = pickle.dumps(kept["bytes"])
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
def test_a_damaged_entry_is_made_again_and_said(store, harm, capsys):
    store.get("thing-1", LAYOUT, fill)
    harm(store.file("thing-1"))
    assert store.get("thing-1", LAYOUT, fill)["bytes"][:].tolist() == [7] * 7
    said = capsys.readouterr().out
    assert "thing-1 is damaged" in said
    assert "made again" in said
    store.get("thing-1", LAYOUT, no_fill)


def test_damage_in_a_later_block_is_found(store, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1000)
    layout = {"bytes": (torch.uint8, (10_000,))}
    store.get("thing-1", layout, lambda tensors, *_: tensors["bytes"].fill_(3))
    with store.file("thing-1").open("r+b") as file:
        file.seek(7777)
        file.write(b"\x02")
    store.get("thing-1", layout, lambda tensors, *_: tensors["bytes"].fill_(4))
    assert store.get("thing-1", layout, no_fill)["bytes"][:].tolist() == [4] * 10_000


def test_a_failure_while_making_leaves_nothing(store):
    def fails(tensors, rank, processes):
        tensors["bytes"][:] = 1
        raise KeyError("half way")

    with pytest.raises(KeyError, match="half way"):
        store.get("thing-1", LAYOUT, fails)
    assert [path.name for path in store.folder.iterdir() if not path.name.endswith(".lock")] == []
    assert store.get("thing-1", LAYOUT, fill)["bytes"][:].tolist() == [7] * 7


KILLED = """
import sys, time, torch
from pathlib import Path
from smolvlm_exp.engine.disk_cache import DiskCache
def fill(tensors, rank, processes):
    tensors["bytes"][:] = 1
    print("half way", flush=True)
    time.sleep(60)
DiskCache(Path(sys.argv[1]), 2**40).get("thing-1", {"bytes": (torch.uint8, (7,))}, fill)
"""


def test_a_killed_maker_leaves_nothing_that_is_taken_for_whole(store):
    maker = subprocess.Popen([sys.executable, "-c", KILLED, str(store.folder)], stdout=subprocess.PIPE, text=True)
    assert maker.stdout.readline() == "half way\n"
    assert (store.folder / ".thing-1.part").exists()
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    layout = {"bytes": (torch.uint8, (7,))}
    kept = store.get("thing-1", layout, lambda tensors, *_: tensors["bytes"][1:].fill_(2))
    assert kept["bytes"][:].tolist() == [0, 2, 2, 2, 2, 2, 2]
    assert not (store.folder / ".thing-1.part").exists()


def ask(folder, log, number):
    def slow(tensors, rank, processes):
        with log.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(2)
        tensors["bytes"][:] = 5

    kept = DiskCache(folder, PLENTY).get("thing-1", {"bytes": (torch.uint8, (7,))}, slow)
    assert kept["bytes"][:].tolist() == [5] * 7


def test_of_several_that_ask_at_once_one_makes_it(store, tmp_path):
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    askers = [context.Process(target=ask, args=(store.folder, log, n)) for n in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(60)
    assert [asker.exitcode for asker in askers] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_over_the_budget_is_said_in_one_line(tmp_path, capsys):
    store = DiskCache(tmp_path / "cache", 50)
    assert store.get("thing-1", LAYOUT, no_fill) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "trainer.cache_disk" in line
    assert "computed anew" in line


def test_what_is_there_counts_towards_the_budget(tmp_path, capsys):
    store = DiskCache(tmp_path / "cache", 30_000)
    layout = {"bytes": (torch.uint8, (20_000,))}
    assert store.get("thing-1", layout, lambda *_: None) is not None
    assert store.get("thing-2", layout, lambda *_: None) is None
    assert "of it used in" in capsys.readouterr().out
    assert store.get("thing-1", layout, no_fill) is not None


def test_a_full_disk_is_said_in_one_line(store, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert store.get("thing-1", LAYOUT, no_fill) is None
    assert "No space left on device" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(module, "SPARE", 2**60)
    assert store.get("thing-1", LAYOUT, no_fill) is None
    assert "free" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file stands where the folder should")
    assert DiskCache(tmp_path / "cache", PLENTY).get("thing-1", LAYOUT, no_fill) is None
    assert "cannot be kept" in capsys.readouterr().out


def test_keep_takes_ram_first_then_disk_then_nothing(store, tmp_path, capsys):
    size = 3 * 5 * 4 + 7 + 8
    ram = cached_tensors("things", "thing-1", LAYOUT, fill, store, size, None)
    assert isinstance(ram["numbers"], torch.Tensor)
    assert not store.folder.exists()
    disk = cached_tensors("things", "thing-1", LAYOUT, fill, store, size - 1, None)
    assert isinstance(disk["numbers"], MappedTensor)
    assert torch.equal(ram["numbers"], disk["numbers"][:])
    assert cached_tensors("things", "thing-1", LAYOUT, no_fill, None, size - 1, None) is None
    assert "trainer.cache_ram" in capsys.readouterr().out


def test_keys_are_the_same_in_every_process_whatever_the_order():
    parts = {"rows": [1, 2], "dtype": "float32", "none": None}
    here = cache_key("thing", **parts)
    again = dict(reversed(parts.items()))
    code = f"from smolvlm_exp.engine.disk_cache import cache_key; print(cache_key('thing', **{again!r}))"
    env = {**os.environ, "PYTHONHASHSEED": "123"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert there.strip() == here
    assert cache_key("thing", **{**parts, "none": 0}) != here
