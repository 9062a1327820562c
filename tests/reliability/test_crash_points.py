"""Every write, rename, removal and sync of a run is a point at which it is killed, as if the power failed then.

Of what was written and not synced the second half is lost. Resumed, it is the run that was left alone, or a line says
what is missing.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from errno import EIO, ENOSPC
from pathlib import Path

import pytest
import safetensors.torch

from smolvlm_exp import main
from smolvlm_exp.config.schema import parse
from smolvlm_exp.runs.checkpoint import checkpoints
from smolvlm_exp.runs.find import summary_of
from tests.conftest import QUICK
from tests.reliability.conftest import command_line, forked, logged

SMALLEST = (
    *(o for o in QUICK if not o.startswith("trainer.save_strategy")), "trainer.max_steps=2", "trainer.save_steps=1",
    "data.train_rows=4", "data.test_rows=2", "trainer.eval_strategy=no", "trainer.per_device_train_batch_size=1",
    "adapter.r=2", r"adapter.target='.*text_model\.layers\.0\.self_attn\.q_proj'", "trainer.cache_ram=1GiB",
)  # fmt: skip
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


class CrashPoints:
    """Counts what this process changes under a folder, and kills it at one of these points, or fails from there on.

    Args:
        error: of the disk, in place of the kill: ENOSPC stays, EIO is over after one time.
    """

    def __init__(self, folder: Path, kill_at: int = 0, error: int = 0) -> None:
        self.folder, self.kill_at, self.seen, self.error = folder, kill_at, 0, error
        self.unsynced: dict[str, int] = {}  # file -> bytes of it that are on the disk for certain
        sys.addaudithook(self.watch)
        self.sync, self.save = os.fsync, safetensors.torch.serialize_file
        os.fsync = self.on_sync  # neither raises an audit event
        safetensors.torch.serialize_file = self.on_save

    def point(self, path: object) -> bool:
        """Whether it is under the folder; does not return from the point to be killed at."""
        if not str(path).startswith(f"{self.folder}/"):
            return False
        self.seen += 1
        if self.error and (self.seen == self.kill_at or (self.error == ENOSPC and self.seen > self.kill_at)):
            raise OSError(self.error, os.strerror(self.error))
        if self.seen == self.kill_at and not self.error:
            for written, synced in self.unsynced.items():
                with contextlib.suppress(OSError):
                    os.truncate(written, (synced + os.stat(written).st_size) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def watch(self, event: str, arguments: tuple) -> None:
        path = os.fsdecode(arguments[0]) if arguments and isinstance(arguments[0], str | bytes | Path) else ""
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and self.point(path):
            appended = arguments[2] & os.O_APPEND and os.path.exists(path)
            self.unsynced[path] = os.stat(path).st_size if appended else 0
        elif event in CHANGES and self.point(path) and event == "os.rename":
            target = os.fsdecode(arguments[1])
            moved = [name for name in self.unsynced if name == path or name.startswith(f"{path}/")]
            self.unsynced |= {target + name.removeprefix(path): self.unsynced.pop(name) for name in moved}

    def on_sync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self.point(path)
        self.sync(descriptor)
        self.unsynced.pop(path, None)

    def on_save(self, tensors: object, filename: object, *args: object, **kwargs: object) -> None:
        inside = self.point(filename)
        self.save(tensors, filename, *args, **kwargs)
        if inside:
            self.unsynced[str(filename)] = 0


def run(*overrides: str) -> None:
    """The command itself, in this process."""
    main.run_once(command_line(*overrides), lambda composed: main.execute(parse(composed), main.output_folder()))


def outcome(job: Callable[[], None], log: Path) -> tuple[int, str]:
    """The exit code of a fork that runs `job`, and its last line."""
    log.unlink(missing_ok=True)
    _, status = os.waitpid(forked(job, log), 0)
    return os.waitstatus_to_exitcode(status), log.read_text().strip().rpartition("\n")[2]


def result(folder: Path) -> dict:
    """All that a run leaves, save times."""
    summary = {key: value for key, value in summary_of(folder).items() if not key.startswith("seconds")}
    summary["train"] = {key: summary["train"][key] for key in ("steps", "first_loss", "last_loss")}
    # The paths of the folder are in it.
    stable = {name: value for name, value in summary.items() if name not in ("advice", "sources")}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("."))
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    rows = (folder / "rows.safetensors").read_bytes() + (folder / "answers.jsonl").read_bytes()
    assert "</html>" in (folder / "report.html").read_text()
    return {"summary": stable, "names": names, "adapter": adapter, "rows": rows, "log": logged(folder)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run that is left alone, its cache, and how many points it has."""
    folder = tmp_path_factory.mktemp("alone")
    cache = f"trainer.cache={folder}/cache"

    def job() -> None:
        points = CrashPoints(folder / "run")
        run(*SMALLEST, cache, f"hydra.run.dir={folder}/run")
        print(points.seen)

    code, last = outcome(job, folder / "log")
    assert code == 0, last
    return folder / "run", cache, int(last)


class Begun:
    """A command that is killed at its points and given again: from nothing, or from a copy of what there was."""

    def __init__(self, alone: tuple[Path, str, int], folder: Path) -> None:
        self.whole, self.cache, _ = alone
        self.folder, self.path, self.log = folder, folder / "run", folder / "log"

    def begin(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def command(self) -> list[str]:
        return [*SMALLEST, self.cache, f"hydra.run.dir={self.path}"]

    def again(self) -> list[str]:
        return [f"resume={self.path}"]

    def compare(self) -> None:
        """What it left is what the whole one left, save when it was resumed."""
        mine, whole = result(self.path), result(self.whole)
        assert {key: mine["summary"].get(key) for key in whole["summary"]} == whole["summary"]
        assert {**mine, "summary": None} == {**whole, "summary": None}

    def count(self) -> int:
        self.begin()

        def job() -> None:
            points = CrashPoints(self.path)
            run(*self.command())
            print(points.seen)

        code, last = outcome(job, self.log)
        assert code == 0, self.log.read_text()[-3000:]
        self.compare()
        return int(last)

    def killed_at(self, point: int) -> str:
        """What became of it: `same` in the end, or what a line says is missing."""
        self.begin()

        def job() -> None:
            CrashPoints(self.path, point)
            run(*self.command())

        code, last = outcome(job, self.log)
        assert code == -signal.SIGKILL, (point, last)
        code, last = outcome(lambda: run(*self.again()), self.log)
        if code and "has finished" not in last:
            assert "utils.errors.RequestError: " in self.log.read_text(), (point, self.log.read_text()[-3000:])
            assert not checkpoints(self.path), (point, last)
            return last.partition(": ")[2].replace(str(self.path), "")
        self.compare()
        return "same"


class OnAFullDisk(Begun):
    """From one point on nothing can be written; when there is space again it is resumed."""

    error = ENOSPC

    def killed_at(self, point: int) -> str:
        self.begin()

        def job() -> None:
            CrashPoints(self.path, point, self.error)
            run(*self.command())

        code, last = outcome(job, self.log)
        said = self.log.read_text()
        if not code:  # what only describes a run may fail alone
            assert self.error == EIO, (point, said[-3000:])
            return "told" if "failed (OSError" in said else "unnoticed"
        if self.error == ENOSPC:
            assert "RunError: no space left in" in said or "RequestError: " in last, (point, said[-3000:])
        assert said.count("Traceback") < 5, (point, said[-6000:])
        if not checkpoints(self.path):
            return "no checkpoint"
        code, last = outcome(lambda: run(*self.again()), self.log)
        assert not code, (point, self.log.read_text()[-3000:])
        self.compare()
        return "same"


class OnABadDisk(OnAFullDisk):
    """One write fails."""

    error = EIO


class Resumed(Begun):
    """From the first checkpoint, as a kill right after it leaves a run."""

    def begin(self) -> None:
        super().begin()
        shutil.copytree(self.whole, self.path)
        for name in ("checkpoints/checkpoint-2", "adapter"):
            shutil.rmtree(self.path / name)
        for name in ("summary.json", "report.html", "rows.safetensors", "answers.jsonl", "images.json"):
            (self.path / name).unlink()

    def command(self) -> list[str]:
        return self.again()


class Exported(Begun):
    """Into the run's folder, where a second export replaces the first."""

    def begin(self) -> None:
        super().begin()
        shutil.copytree(self.whole, self.path)
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(self.folder / "earlier", self.path / "export")

    def command(self) -> list[str]:
        tolerant = ("export.on_fail=mark", "task.max_new_tokens=2", "export.format=adapter")
        return ["task=export", f"run={self.path}", *tolerant, f"hydra.run.dir={self.folder}/out"]

    again = command

    def compare(self) -> None:
        """The first export is what the others are compared with, and replace."""
        written = self.path / "export"
        if not (self.folder / "earlier").exists():
            shutil.copytree(written, self.folder / "earlier")
        earlier = self.folder / "earlier"
        names = sorted(str(path.relative_to(earlier)) for path in earlier.rglob("*") if path.is_file())
        assert names == sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
        same = [name for name in names if not name.endswith((".lock", "export.json", "README.md"))]
        assert all((written / name).read_bytes() == (earlier / name).read_bytes() for name in same)
        record, first = (json.loads((each / "adapter" / "export.json").read_text()) for each in (written, earlier))
        assert record["parity"] == first["parity"]


def test_killed_at_some_points(alone, tmp_path):
    """Right before `done` is told, and right after it; those of a save are in test_checkpoints.py."""
    *_, count = alone
    for point in (count - 1, count):
        assert Begun(alone, tmp_path).killed_at(point) == "same"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Begun, Resumed, Exported, OnAFullDisk, OnABadDisk])
def test_killed_at_every_point(alone, tmp_path, kind):
    command = kind(alone, tmp_path)
    said = [command.killed_at(point) for point in range(1, command.count() + 1)]
    print(kind.__name__, len(said), {line: said.count(line) for line in dict.fromkeys(said)})
    assert kind not in (Resumed, Exported) or set(said) == {"same"}
    assert said.count("same") > len(said) / 2
