"""A run, a sweep, a resume and an export at each of their points (crash_points.py): killed there, or the disk fails.

Given again, the command leaves what one that was left alone leaves, or a line says what is missing.
"""

import contextlib
import csv
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from errno import EIO, ENOSPC
from importlib import import_module
from pathlib import Path

import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from smolvlm_exp import main
from smolvlm_exp.config.schema import Config
from smolvlm_exp.runs.checkpoint import SAVING, checkpoints, damage, disk_error_as_run_error, finalise, newest_intact
from smolvlm_exp.runs.event_log import append_event
from smolvlm_exp.runs.find import saved_hydra, summary_of
from smolvlm_exp.sweep.results import read_results
from smolvlm_exp.tasks import train as training
from smolvlm_exp.utils.files import write_json
from tests.conftest import QUICK, read_lines
from tests.reliability.conftest import forked, logged
from tests.reliability.crash_points import CrashPoints

SMALLEST = (
    *(o for o in QUICK if not o.startswith("trainer.save_strategy")), "trainer.max_steps=2", "trainer.save_steps=1",
    "data.train_rows=4", "data.test_rows=2", "trainer.eval_strategy=no", "trainer.per_device_train_batch_size=1",
    "adapter.r=2", r"adapter.target='.*text_model\.layers\.0\.self_attn\.q_proj'", "trainer.cache_ram=1GiB",
)  # fmt: skip
PRELOADED = ("tasks.train", "tasks.export", "training.dpo", "training.trainers", "sweep.grid", "sweep.pruning_callback")


def typed(words: Sequence[str]) -> None:
    """`python -m smolvlm_exp WORDS` in this process, a sweep's jobs in forks of it; what writes nothing is left out."""
    main.check_command = training.check_upstream = lambda *args: None
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None  # type: ignore[method-assign]
    if "-m" in words:
        training.train = brief_train
        JournalFileSymlinkLock.__init__.__defaults__ = (3,)  # seconds to wait for a process that was killed
    sys.argv = ["smolvlm_exp", *words]
    main.main()


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
    assert saved_hydra(folder, "config")["seed"] == summary["seed"]
    assert not any(map(damage, checkpoints(folder)))
    return {"summary": stable, "names": names, "adapter": adapter, "rows": rows, "log": logged(folder)}


def check_same(mine: dict, whole: dict) -> None:
    """Where it was resumed is all that a run may tell that the whole one does not."""
    assert {key: mine["summary"].get(key) for key in whole["summary"]} == whole["summary"]
    assert {**mine, "summary": None} == {**whole, "summary": None}


class Run:
    """A command that is disturbed and given again: from nothing, or from a copy of what there was."""

    def __init__(self, whole: Path, folder: Path) -> None:
        self.whole, self.folder, self.path, self.log = whole, folder, folder / "run", folder / "log"

    def begin(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def words(self) -> list[str]:
        return [*SMALLEST, f"trainer.cache={self.whole.parent}/cache", f"hydra.run.dir={self.path}"]

    @property
    def again(self) -> list[str]:
        return [f"resume={self.path}"]

    def compare(self) -> None:
        check_same(result(self.path), result(self.whole))

    def missing(self, line: str) -> None:
        """The line is right: there is nothing to continue from, and another folder would be used."""
        assert not checkpoints(self.path), line

    def give(self, words: Sequence[str], kill_at: int = 0, error: int = 0) -> tuple[int, str]:
        """The exit code, and all that was printed."""
        self.log.unlink(missing_ok=True)

        def job() -> None:
            if kill_at >= 0:
                CrashPoints(self.path, self.folder / "points", kill_at, error)
            typed(words)

        _, status = os.waitpid(forked(job, self.log), 0)
        return os.waitstatus_to_exitcode(status), self.log.read_text()

    def count(self) -> int:
        """Its points."""
        self.begin()
        code, said = self.give(self.words)
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
        code, said = self.give(self.again, -1)
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
        shutil.copytree(self.whole, self.path)
        for name in ("checkpoints/checkpoint-2", "adapter"):
            shutil.rmtree(self.path / name)
        for name in ("summary.json", "report.html", "rows.safetensors"):
            (self.path / name).unlink()

    words = Run.again


class Exported(Run):
    """Into the run's folder, where a second export replaces the first."""

    def begin(self) -> None:
        super().begin()
        shutil.copytree(self.whole, self.path)
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(self.folder / "earlier", self.path / "export")

    @property
    def words(self) -> list[str]:
        tolerant = ("export.on_fail=mark", "task.max_new_tokens=2", "export.format=adapter")
        return ["task=export", f"run={self.path}", *tolerant, f"hydra.run.dir={self.folder}/out"]

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


def brief_train(config: Config, folder: Path, watchers: Sequence = ()) -> dict:
    """In place of a sweep's runs, whose own points are those of `Run`: a checkpoint, and `done` as the last."""
    with disk_error_as_run_error(folder):
        if config.resume:
            newest_intact(folder)
        else:
            append_event(folder / "metrics.jsonl", {"step": 1, "loss": 1 / config.seed})
            staging = folder / "checkpoints" / SAVING / "checkpoint-1"
            staging.mkdir(parents=True)
            finalise(staging, folder / "checkpoints" / staging.name)
        after, train = {"preference_accuracy": config.seed / 4}, {"seconds": 1.0, "pairs_per_second": 1.0}
        summary = {"status": "done", "seed": config.seed, "seconds": 1.0, "after": after, "train": train}
        write_json(folder / "summary.json", summary)
    return summary


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
        code, said = self.give(self.words, -1)
        assert code == 0, said[-3000:]
        self.compare()


class Searched(Swept):
    """Two trials of a search; which seeds it draws depends on when it was disturbed."""

    kind = ("hydra/sweeper=search", "hydra.sweeper.n_trials=2", "seed=range(1,3)", "metric=after.preference_accuracy")
    seeds = ()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that is left alone; beside it is its cache."""
    for module in ("pandas", *(f"smolvlm_exp.{name}" for name in PRELOADED)):
        import_module(module)  # once, not in every fork
    gc.freeze()
    run = Run(tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("first"))
    code, said = run.give(run.words)
    assert code == 0, said[-3000:]
    shutil.copytree(run.path, run.whole)
    shutil.copy(run.folder / "points", run.whole.parent)
    return run.whole


def test_disturbed_at_some_points(whole, tmp_path):
    """Those of a save are in test_checkpoints.py."""
    run, last = Run(whole, tmp_path), json.loads((whole.parent / "points").read_text())[0]
    assert run.disturbed_at(last) == "same"  # `done` has just been told
    assert run.disturbed_at(last - 3, EIO) == "same"  # it cannot be
    sweep = Swept(whole, tmp_path)
    assert sweep.disturbed_at(70) == "same"  # in the second job
    assert sweep.disturbed_at(30, ENOSPC) == "same"  # in the first


@pytest.mark.slow
@pytest.mark.parametrize("error", [0, ENOSPC, EIO], ids=["killed", "full disk", "bad disk"])
@pytest.mark.parametrize("command", [Run, Resumed, Exported, Swept, Searched])
def test_disturbed_at_every_point(whole, tmp_path, command, error):
    tried = command(whole, tmp_path)
    said = [tried.disturbed_at(point, error) for point in range(1, tried.count() + 1)]
    print(command.__name__, error, len(said), {line: said.count(line) for line in dict.fromkeys(said)})
    assert said.count("same") > len(said) / 2
