"""Looking whether a place is taken and taking it are one act: two commands begin while the moment between is long."""

import contextlib
import os
import signal
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from smolvlm_exp.data.repository import DataFile, Part, Repository
from smolvlm_exp.runs import folder as folders
from smolvlm_exp.runs.folder import check_unused, check_unused_sweep, lock_file, lock_run_folder
from smolvlm_exp.runs.sweep_record import Job, read_jobs
from smolvlm_exp.sweep import grid
from smolvlm_exp.sweep.optuna_study import SearchConf, open_study
from smolvlm_exp.sweep.results import read_results
from smolvlm_exp.tasks import export as exporting
from smolvlm_exp.tasks import generate as generating
from smolvlm_exp.tasks.command import output_folder, run_once
from smolvlm_exp.utils.errors import RequestError, RunError
from tests.conftest import compose
from tests.reliability.conftest import command_line, forked

MOMENT = 0.3  # seconds


def slowly(function):
    """What `function` saw is old when it returns."""

    def call(*args, **kwargs):
        seen = function(*args, **kwargs)
        time.sleep(MOMENT)
        return seen

    return call


def both(first, second, folder: Path) -> list[str]:
    """What two processes printed that run these at once; empty: nothing, and the exit code was 0."""
    children = [(forked(job, folder / f"log-{i}"), folder / f"log-{i}") for i, job in enumerate((first, second))]
    said = []
    for child, log in children:
        _, status = os.waitpid(child, 0)
        said.append(log.read_text() if os.waitstatus_to_exitcode(status) else "")
    return said


def write_slowly(composed):
    folder = output_folder()
    assert sorted(path.name for path in folder.iterdir()) == [".hydra", ".lock"]
    time.sleep(MOMENT)
    (folder / "summary.json").write_text(str(composed.seed))


def test_two_runs_begin_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = [
        lambda i=i: run_once(command_line("tracker=none", "hydra.run.dir=run", f"seed={i}"), write_slowly)
        for i in (1, 2)
    ]
    said = both(*jobs, tmp_path)
    assert sorted(map(bool, said)) == [False, True]
    assert "hydra.run.dir=run already holds a run (summary.json), which is never overwritten" in "".join(said)
    saved = yaml.safe_load((tmp_path / "run" / ".hydra" / "config.yaml").read_text())
    assert str(saved["seed"]) == (tmp_path / "run" / "summary.json").read_text()


@pytest.mark.parametrize("how", ["interpolated", "forced", "in a file", "by another task"])
def test_a_run_is_not_written_over_however_its_folder_is_named(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "a"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").write_text("task: {name: train}")
    (run / "checkpoints").mkdir()
    own = tmp_path / "own" / "experiment" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\nhydra: {run: {dir: outputs/a}}\n")
    overrides, config_dir = {
        "interpolated": (["name=a", "hydra.run.dir=outputs/${name}"], None),
        "forced": (["++hydra.run.dir=outputs/a"], None),
        "in a file": (["experiment=own"], own.parents[1]),
        "by another task": (["task=compare", "hydra.run.dir=outputs/a"], None),
    }[how]
    args = command_line(*overrides, config_dir=config_dir)
    with pytest.raises(RequestError, match=r"hydra\.run\.dir=outputs/a already holds a run \(checkpoints\)"):
        run_once(args, lambda composed: pytest.fail("it began"))
    assert (run / ".hydra" / "config.yaml").read_text() == "task: {name: train}"
    assert {path.name for path in run.iterdir()} <= {".hydra", ".lock", "checkpoints"}


def test_what_writes_no_folder_leaves_the_working_folder_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for task in ("plan", "doctor"):
        assert run_once(command_line(f"task={task}"), lambda composed: composed.task.name) == task
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_completes_an_earlier_command_goes_on_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        args = command_line("task=mine", "hydra.run.dir=run")
        run_once(args, lambda composed: (output_folder() / "summary.json").touch())
    with pytest.raises(RequestError, match="already holds a run"):
        run_once(command_line("task=evaluate", "hydra.run.dir=run"), print)


def jobs(*ranks: int) -> list[Job]:
    return [Job(0, (f"adapter.r={rank}",)) for rank in ranks]


def of_sweep(sweeper: str = "hydra_plugins.smolvlm_exp.Grid", task: str = "train"):
    return OmegaConf.create({"hydra": {"sweeper": {"_target_": sweeper}}, "task": {"name": task}})


def test_two_grids_begin_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "read_jobs", slowly(read_jobs))
    sweep = tmp_path / "sweep"
    said = both(*(lambda r=r: grid.claim(sweep, jobs(*r), of_sweep()) for r in ((2, 3), (5, 6))), tmp_path)
    assert sorted(map(bool, said)) == [False, True]
    assert "that sweep has other jobs: adapter.r is" in "".join(said)
    assert [job.number for job in read_jobs(sweep)] == [0, 1]
    ranks = (2, 3) if not said[0] else (5, 6)
    assert [dict(job.settings) for job in read_jobs(sweep)] == [{"adapter.r": str(rank)} for rank in ranks]


def test_the_same_grid_is_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "read_jobs", slowly(read_jobs))
    same = [lambda: grid.claim(tmp_path / "sweep", jobs(2, 3), of_sweep())] * 2
    assert both(*same, tmp_path) == ["", ""]


def test_a_sweep_is_not_written_over_by_one_of_another_kind(tmp_path):
    grid.claim(tmp_path, jobs(2, 3), of_sweep())
    check_unused_sweep(tmp_path, of_sweep())
    for other in (of_sweep("hydra_plugins.smolvlm_exp.Search"), of_sweep(task="evaluate")):
        with pytest.raises(RequestError, match=r"already holds a sweep \(Grid of task=train\)"):
            check_unused_sweep(tmp_path, other)
    (tmp_path / "multirun.yaml").write_text(OmegaConf.to_yaml(of_sweep(task="evaluate")))
    with pytest.raises(RequestError, match="Grid of task=evaluate"):
        check_unused_sweep(tmp_path, of_sweep(task="evaluate"))


@pytest.mark.parametrize("place", ["1/adapter", "1/.hydra", "summary.json", ".hydra"])
def test_a_sweep_takes_no_folder_of_a_run(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    with pytest.raises(RequestError, match=rf"already holds a run \({Path(place).name}\)"):
        grid.claim(tmp_path, jobs(2, 3), of_sweep())
    assert not (tmp_path / "sweep.json").exists()


def test_a_run_takes_no_folder_of_a_sweep(tmp_path):
    grid.claim(tmp_path, jobs(2, 3), of_sweep())
    for folder in (tmp_path, tmp_path / "0"):
        with pytest.raises(RequestError, match=rf"hydra.run.dir={folder}: {tmp_path} holds a sweep"):
            check_unused(folder, "train")
    check_unused(tmp_path / "other", "train")


def test_two_searches_begin_one_study(tmp_path, monkeypatch):
    import optuna

    monkeypatch.setattr(optuna, "create_study", slowly(optuna.create_study))
    spaces = (["adapter.r=choice(4,8)"], ["adapter.r=choice(4,16)"])
    said = both(*(lambda s=s: open_study(tmp_path, SearchConf(), 1, s) for s in spaces), tmp_path)
    assert sorted(map(bool, said)) == [False, True]
    assert "is another search: adapter.r=choice" in "".join(said)


@contextlib.contextmanager
def held_elsewhere(lock, folder):
    """Within, another process has what `lock` locks, until it is killed."""
    held = folder / "held"

    def hold():
        with lock():
            held.touch()
            time.sleep(60)

    child = forked(hold, folder / "log")
    while not held.exists():
        time.sleep(0.01)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_commands_answer_into_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", MOMENT)
    monkeypatch.setattr(generating, "answered", lambda *args: pytest.fail("it was read while it was written"))
    (tmp_path / "questions.jsonl").write_text('{"image": "a.png", "question": "What is it?"}\n')
    asked = ("task=generate", f"task.questions={tmp_path}/questions.jsonl", f"task.answers={tmp_path}/answers.jsonl")
    in_use = pytest.raises(RequestError, match=r"answers\.jsonl is in use: another process is writing there")
    with held_elsewhere(lambda: lock_file(tmp_path / "answers.jsonl"), tmp_path), in_use:
        generating.generate(compose(*asked), tmp_path)


def test_what_came_into_an_export_while_it_was_made_is_not_deleted(tmp_path, monkeypatch):
    target = tmp_path / "export" / "merged"

    class Exporter:
        def __init__(self, *args):
            pass

        def write_merged(self, staging, target):
            with pytest.raises(Timeout):
                FileLock(tmp_path / "export" / ".lock").acquire(timeout=0)
            (staging / "model.safetensors").write_bytes(b"")
            target.mkdir(exist_ok=True)
            (target / "thesis.txt").write_text("mine")

    monkeypatch.setattr(exporting, "Exporter", Exporter)
    config = compose("task=export", "export.format=merged", f"export.folder={tmp_path}/export")
    with pytest.raises(RequestError, match=r"has other files \(thesis\.txt\)"):
        exporting.export(config, tmp_path)
    assert (target / "thesis.txt").read_text() == "mine"


def test_what_is_trained_further_while_it_is_exported_is_not_mixed(tmp_path, monkeypatch):
    """The adapter is read when it is measured, and again when it is written."""
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"old")

    class Exporter:
        def __init__(self, *args):
            pass

        def write_adapter(self, staging, target):
            (adapter / "part").write_bytes(b"new")
            (adapter / "part").replace(adapter / "adapter_model.safetensors")
            (staging / "adapter_model.safetensors").write_bytes(b"new")

    monkeypatch.setattr(exporting, "Exporter", Exporter)
    where = (f"model.adapter={adapter}", f"export.folder={tmp_path}/export")
    config = compose("task=export", "export.format=adapter", *where)
    with pytest.raises(RunError, match="changed while adapter was exported"):
        exporting.export(config, tmp_path)
    assert not (tmp_path / "export" / "adapter").exists()


def test_a_job_that_another_command_runs_is_neither_missing_nor_failed(tmp_path):
    grid.claim(tmp_path, jobs(2, 3), of_sweep())
    for number in "01":
        (tmp_path / number).mkdir()
    (tmp_path / "0" / "summary.json").write_text('{"status": "done"}')
    with held_elsewhere(lambda: lock_run_folder(tmp_path / "1"), tmp_path):
        results = read_results(tmp_path, None)
    assert [job.status for job in results.jobs] == ["done", "running"]
    assert not results.failed()
    assert [job.status for job in read_results(tmp_path, None).jobs] == ["done", "missing"]


def test_two_processes_fetch_the_same_rows(tmp_path, monkeypatch):
    """Each writes a file of its own: what the other is still writing is not taken for whole."""
    parts = []
    monkeypatch.setattr("smolvlm_exp.data.repository.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("huggingface_hub.HfFileSystem.open", lambda *args: BytesIO())
    source = SimpleNamespace(schema_arrow=None, read_row_group=lambda group: None)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", lambda *args, **kwargs: source)

    class Writer:
        def __init__(self, path, schema):
            parts.append(path)
            path.touch()

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731
        write_table = lambda self, table: None  # noqa: E731

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter", Writer)
    repository = Repository("a/b", "c" * 40, None, "parquet", {}, "")
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        repository.fetch_groups(Part(DataFile("a.parquet", 9), (0,), 9))
    assert len(set(parts)) == 2
