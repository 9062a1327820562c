"""A run, a sweep, a resume and an export at each of their points (crash_points.py): killed there, or the disk fails.

Given again, the command leaves what one that was left alone leaves, or a line says what is missing.
"""

import contextlib
import csv
import json
import os
import shutil
import signal
from collections.abc import Sequence
from errno import EIO, ENOSPC
from pathlib import Path

import pytest

from smolvlm_exp.runs.checkpoint import checkpoints, damage
from smolvlm_exp.runs.find import saved_hydra
from smolvlm_exp.sweep.results import read_results
from tests.conftest import read_lines
from tests.reliability.crash_points import CrashPoints
from tests.reliability.smallest import SMALLEST, TOLERANT, check_same, ended, result, typed


class Run:
    """A command that is disturbed and given again: from nothing, or from a copy of what there was."""

    def __init__(self, alone: Path, folder: Path) -> None:
        self.alone, self.folder, self.path = alone, folder, folder / "run"

    def begin(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def words(self) -> list[str]:
        return [*SMALLEST, f"hydra.run.dir={self.path}"]

    @property
    def again(self) -> list[str]:
        return [f"resume={self.path}"]

    def compare(self) -> None:
        check_same(result(self.path), result(self.alone))

    def missing(self, line: str) -> None:
        """The line is right: there is nothing to continue from, and another folder would be used."""
        assert not checkpoints(self.path), line

    def give(self, words: Sequence[str], kill_at: int = -1, error: int = 0) -> tuple[int, str]:
        """The exit code, and all that was printed; kill_at=0 counts its points."""

        def begin() -> None:
            if kill_at >= 0:
                CrashPoints(self.path, self.folder / "points", kill_at, error)

        return ended(typed(words, self.folder / "log", begin), self.folder / "log")

    def count(self) -> int:
        """Its points."""
        self.begin()
        code, said = self.give(self.words, 0)
        assert code == 0, said[-3000:]
        self.compare()
        return json.loads((self.folder / "points").read_text())[0]

    def disturbed_at(self, point: int, error: int = 0) -> str:
        """What became of it: `same` in the end, or what a line says is missing.

        Args:
            error: of the disk; 0: it is killed.
        """
        self.begin()
        code, said = self.give(self.words, point, error)
        if error:
            assert "Traceback" not in said, (point, said[-6000:])
            if code == 0:  # what only describes a run may fail alone
                assert error == EIO, (point, said[-3000:])
                if "failed (OSError" in said:
                    return "told"
                self.compare()
                return "unnoticed"
            lines = [
                line for line in said.splitlines() if line.startswith(("smolvlm_exp: ", "[0] failed", "[1] failed"))
            ]
            assert any(str(self.path) in line and os.strerror(error) in line for line in lines), (point, said[-3000:])
        else:
            assert code == -signal.SIGKILL, (point, said[-3000:])
        return self.given_again(point)

    def given_again(self, point: int) -> str:
        code, said = self.give(self.again)
        if code and "has finished" not in said:
            line = next(line for line in said.splitlines() if line.startswith("smolvlm_exp: "))
            assert "Traceback" not in said, (point, said[-3000:])
            self.missing(line)
            return line.partition(": ")[2].replace(str(self.path), "")
        self.compare()
        return "same"


class Resumed(Run):
    """From the first checkpoint, as a kill right after it leaves a run."""

    def begin(self) -> None:
        super().begin()
        shutil.copytree(self.alone, self.path)
        for name in ("checkpoints/checkpoint-2", "adapter"):
            shutil.rmtree(self.path / name)
        for name in ("summary.json", "report.html", "rows.safetensors", "answers.jsonl", "images.json"):
            (self.path / name).unlink()

    words = Run.again


class Exported(Run):
    """Into the run's folder, where a second export replaces the first."""

    def begin(self) -> None:
        super().begin()
        shutil.copytree(self.alone, self.path)
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(self.folder / "earlier", self.path / "export")

    @property
    def words(self) -> list[str]:
        return ["task=export", f"run={self.path}", *TOLERANT, f"hydra.run.dir={self.folder}/out"]

    again = words

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


class Swept(Run):
    """Two jobs, one after the other; the first one's checkpoint goes when the second is better."""

    kind: tuple[str, ...] = ("seed=1,2",)
    seeds: tuple[int, ...] = (1, 2)

    @property
    def words(self) -> list[str]:
        return ["-m", *SMALLEST, *self.kind, f"hydra.sweep.dir={self.path}"]

    @property
    def again(self) -> list[str]:
        return ["-m", f"sweep={self.path}"]

    def compare(self) -> None:
        results = read_results(self.path, None)
        assert self.seeds in ((), tuple(job.summary["seed"] for job in results.jobs))
        for job in results.jobs:
            folder, seed = self.path / str(job.number), int(job.settings["seed"])
            assert (job.status, job.value("after.preference_accuracy")) == ("done", seed / 4)
            assert saved_hydra(folder, "config")["seed"] == job.summary["seed"] == seed
            assert read_lines(folder / "metrics.jsonl") == [{"step": 1, "loss": 1 / seed}]
            assert list(map(damage, checkpoints(folder))) == ([""] if job is results.best else [])
        table = list(csv.DictReader((self.path / "sweep.csv").open()))
        assert [(row["status"], row["best"]) for row in table] == [
            ("done", str(job is results.best)) for job in results.jobs
        ]
        assert len(table) == 2
        assert "</html>" in (self.path / "sweep.html").read_text()
        assert (self.path / "multirun.yaml").stat().st_size

    def missing(self, line: str) -> None:
        """Of the jobs there is no list yet; then the same command begins there."""
        assert "there is no sweep.json in it" in line
        code, said = self.give(self.words)
        assert code == 0, said[-3000:]
        self.compare()


class Searched(Swept):
    """Two trials of a search; which seeds it draws depends on when it was disturbed."""

    kind = ("hydra/sweeper=search", "hydra.sweeper.n_trials=2", "seed=range(1,3)", "metric=after.preference_accuracy")
    seeds = ()


def test_disturbed_at_some_points(alone, tmp_path):
    """Those of a save are in test_checkpoints.py."""
    run = Run(alone, tmp_path)
    last = json.loads((alone.parent / "points").read_text())[0]
    assert run.disturbed_at(last) == "same"  # `done` has just been told
    assert run.disturbed_at(last - 3, EIO) == "same"  # it cannot be
    sweep = Swept(alone, tmp_path)
    assert sweep.disturbed_at(70) == "same"  # in the second job
    assert sweep.disturbed_at(30, ENOSPC) == "same"  # in the first


@pytest.mark.slow
@pytest.mark.parametrize("error", [0, ENOSPC, EIO], ids=["killed", "full disk", "bad disk"])
@pytest.mark.parametrize("command", [Run, Resumed, Exported, Swept, Searched])
def test_disturbed_at_every_point(alone, tmp_path, command, error):
    tried = command(alone, tmp_path)
    said = [tried.disturbed_at(point, error) for point in range(1, tried.count() + 1)]
    print(command.__name__, error, len(said), {line: said.count(line) for line in dict.fromkeys(said)})
    later = [line for line in said if not line.startswith("resume=")]  # than the first checkpoint
    assert said.count("same") > len(later) / 2
