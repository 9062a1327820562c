"""Every write, rename, removal and sync of a run is a point at which it is killed, as if the power failed then.

Of what was written and not synced the second half is lost. Resumed, it is the run that was left alone, or a line says
what is missing.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
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
    """Counts what this process changes under a folder, and kills it at one of these points."""

    def __init__(self, folder: Path, kill_at: int = 0) -> None:
        self.folder, self.kill_at, self.seen = folder, kill_at, 0
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
        if self.seen == self.kill_at:
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
    rows = (folder / "rows.safetensors").read_bytes()
    assert "</html>" in (folder / "report.html").read_text()
    return {"summary": stable, "names": names, "adapter": adapter, "rows": rows, "log": logged(folder)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, module_cache):
    """The run that is left alone: its result, and how many points it has."""
    folder = tmp_path_factory.mktemp("alone")

    def job():
        points = CrashPoints(folder / "run")
        run(*SMALLEST, module_cache, f"hydra.run.dir={folder}/run")
        print(points.seen)

    code, last = outcome(job, folder / "log")
    assert code == 0, (folder / "log").read_text()[-3000:]
    return result(folder / "run"), int(last)


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    return f"trainer.cache={tmp_path_factory.mktemp('cache')}"


def killed_and_resumed(point: int, folder: Path, module_cache: str, whole: dict) -> str:
    """What became of the run that is killed at this point: `same` in the end, or what a line says is missing."""
    path, log = folder / "run", folder / "log"
    shutil.rmtree(path, ignore_errors=True)

    def job():
        CrashPoints(path, point)
        run(*SMALLEST, module_cache, f"hydra.run.dir={path}")

    code, last = outcome(job, log)
    assert code == -signal.SIGKILL, (point, last)
    code, last = outcome(lambda: run(f"resume={path}"), log)
    if code:
        assert "utils.errors.RequestError: " in log.read_text(), (point, log.read_text()[-3000:])
        if "has finished" in last:
            assert result(path) == whole, point
            return "same"
        missing = re.sub(re.escape(str(path)), "", last.partition(": ")[2])
        assert not checkpoints(path), (point, last)
        return missing
    mine = result(path)
    assert mine["summary"]["train"] == whole["summary"]["train"], point
    resumed = {key: value for key, value in mine["summary"].items() if key in whole["summary"]}
    assert {**mine, "summary": resumed} == whole, point
    return "same"


def test_killed_at_some_points(alone, module_cache, tmp_path):
    """In the second save, right before `done` is told, and right after it."""
    whole, count = alone
    for point in (count // 2, count - 1, count):
        assert killed_and_resumed(point, tmp_path, module_cache, whole) == "same"


@pytest.mark.slow
def test_killed_at_every_point(alone, module_cache, tmp_path):
    whole, count = alone
    said = [killed_and_resumed(point, tmp_path, module_cache, whole) for point in range(1, count + 1)]
    print({kind: said.count(kind) for kind in dict.fromkeys(said)}, json.dumps(count))
    assert said.count("same") > count / 2
