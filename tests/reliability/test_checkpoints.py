"""P2, P3, P4, P11: a checkpoint is whole and verified, or invisible; a full disk costs no checkpoint."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import TrainerCallback

from hydra_plugins.smolvlm_exp import Grid
from smolvlm_exp.runs import checkpoint as files
from smolvlm_exp.runs.checkpoint import SAVING, checkpoint_folders, checkpoints, damage, newest_intact
from smolvlm_exp.runs.sweep_record import can_resume
from smolvlm_exp.sweep.job_process import record_failure
from smolvlm_exp.tasks.train import train
from smolvlm_exp.training.state_files import load_state, save_state
from smolvlm_exp.utils.errors import RequestError, RunError
from tests.reliability.conftest import forked

TWO = ("trainer.max_steps=2", "trainer.save_steps=1", "trainer.eval_strategy=no", "trainer.logging_steps=1")


@pytest.fixture(scope="module")
def two(bench, tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    bench.run(folder, *TWO)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    return folder


@pytest.fixture
def run(two, tmp_path):
    """A copy of it to break."""
    return Path(shutil.copytree(two, tmp_path / "run"))


def test_checkpoints_hold_safetensors_and_json_alone(two):
    names = {path.name for path in checkpoints(two)[-1].rglob("*")}
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".md"}
    assert {"optimizer.safetensors", "scheduler.safetensors", "process-0.safetensors", "run.json"} <= names
    assert all(damage(path) == "" for path in checkpoints(two))
    assert not (two / "checkpoints" / SAVING).exists()


def test_any_optimizer_state_comes_back_to_the_bit(tmp_path):
    generator = torch.random.get_rng_state()
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3), "qmap": torch.arange(4).byte()}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "fused": True}],
        "half": torch.randn(5).bfloat16(), "python": (3, (1, 2**32 - 1), None), "nan": float("nan"), "word": "a",
        "generator": generator,
    }  # fmt: skip
    save_state(tmp_path / "tree.safetensors", tree)
    found = load_state(tmp_path / "tree.safetensors")
    assert repr(found) == repr(tree)
    assert found["state"][0]["exp_avg"].equal(tree["state"][0]["exp_avg"])
    assert found["generator"].equal(generator)
    with pytest.raises(TypeError, match="cannot hold function"):
        save_state(tmp_path / "tree.safetensors", {"hook": newest_file})


def newest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns, default=None
    )


def die_at(event_number, folder):
    """kill -9 at the n-th time a file under `folder` is opened, renamed or removed; the file before it is then half."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            return
        if not str(arguments[0]).startswith(str(folder)):
            return
        seen += 1
        if seen == event_number:
            written = newest_file(folder / SAVING)
            if written is not None:
                os.truncate(written, written.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def test_a_kill_at_any_point_of_a_save(bench, tmp_path, capsys):
    """At step 2 the save is tried again and again, killed one event later each time."""
    run, log = tmp_path / "run", tmp_path / "log"
    trainer = bench.trainer(run, *TWO)
    run.mkdir(exist_ok=True)
    real, kills, states = trainer._save_checkpoint, 0, set()

    def save(model, trial):
        nonlocal kills
        status = trainer.state.global_step - 1  # step 1 is saved as ever
        while status:
            folder = run / "checkpoints"

            def job(number=kills + 1, folder=folder):
                die_at(number, folder)
                real(model, trial)

            _, status = os.waitpid(forked(job, log), 0)
            if not status:
                return
            assert os.WTERMSIG(status) == signal.SIGKILL, log.read_text()[-2000:]
            kills += 1
            renamed = (folder / "checkpoint-2").exists()
            states.add(renamed)
            capsys.readouterr()
            assert newest_intact(run).name == ("checkpoint-2" if renamed else "checkpoint-1")
            assert damage(newest_intact(run)) == ""
            assert "was interrupted" in capsys.readouterr().out or not (folder / SAVING).exists()
            shutil.rmtree(folder / "checkpoint-2", ignore_errors=True)
        real(model, trial)

    trainer._save_checkpoint = save
    trainer.train()
    assert newest_intact(run).name == "checkpoint-2"
    assert states == {True, False}
    assert kills >= 20
    print(f"{kills} kills within one save")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {"truncated": truncate, "empty": lambda path: os.truncate(path, 0), "missing": Path.unlink, "flipped": flip}
NAMES = (
    "README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.safetensors",
    "process-0.safetensors", "run.json", "scheduler.safetensors", "trainer_state.json",
)  # fmt: skip


def test_every_file_and_every_damage(run, capsys):
    first, second = checkpoints(run)
    assert sorted(path.name for path in second.iterdir()) == sorted(NAMES)
    tried = 0
    for name in NAMES:
        for harm in DAMAGES.values():
            whole = [(each / name).read_bytes() for each in (first, second)]
            harm(second / name)
            assert newest_intact(run) == first
            told = capsys.readouterr().out
            assert "checkpoint-2 is damaged: " in told
            assert name in told or name == "manifest.json"  # a flipped digest is another file's
            assert "checkpoint-1 is intact" in told
            harm(first / name)
            with pytest.raises(RequestError, match=r"none of its checkpoints is intact[\s\S]*checkpoint-1 is damaged"):
                newest_intact(run)
            for each, data in zip((first, second), whole, strict=True):
                (each / name).write_bytes(data)
            tried += 2
    assert newest_intact(run) == second
    assert tried == 2 * len(NAMES) * len(DAMAGES)
    (second / "optimizer.pt").write_bytes(b"anything")
    assert newest_intact(run) == first
    assert "optimizer.pt is not in its manifest.json" in capsys.readouterr().out


def test_what_is_no_file_or_of_another_step_is_damage(run, capsys):
    """A pipe in a manifest's place is not waited for; a checkpoint is of the step that it is named after."""
    first, second = checkpoints(run)
    for name in NAMES:
        content = (second / name).read_bytes()
        (second / name).unlink()
        os.mkfifo(second / name)
        assert newest_intact(run) == first
        assert f"{name} is not a regular file" in capsys.readouterr().out
        (second / name).unlink()
        (second / name).write_bytes(content)
    shutil.copytree(first, run / "checkpoints" / "checkpoint-99")
    shutil.copytree(first, run / "checkpoints" / "checkpoint-0099")
    empty = run / "checkpoints" / "checkpoint-100"
    empty.mkdir()
    (empty / "manifest.json").write_text('{"files": {}}')
    assert newest_intact(run) == second
    told = capsys.readouterr().out
    assert "checkpoint-99 is damaged: its trainer_state.json is of step 1" in told
    assert "checkpoint-100 is damaged: its trainer_state.json is of step None" in told


def test_a_damaged_checkpoint_takes_no_intact_ones_place(bench, tmp_path):
    """The run resumes from step 1, and saves again at step 4 alone, with one more to keep."""
    four = (*TWO, "trainer.max_steps=4", "trainer.save_total_limit=8")
    bench.run(tmp_path, *four, "trainer.max_steps=4")
    saved = checkpoints(tmp_path)
    shutil.rmtree(saved[3])
    for checkpoint in saved[1:3]:
        flip(checkpoint / "optimizer.safetensors")
    bench.run(tmp_path, *four, "trainer.save_steps=4", "trainer.save_total_limit=2")
    assert {path.name: damage(path) for path in checkpoints(tmp_path)} == {"checkpoint-1": "", "checkpoint-4": ""}


def test_a_resumed_run_saves_when_it_is_told_to(bench, run):
    bench.run(run, *TWO, "trainer.max_steps=6", "trainer.save_steps=3", "trainer.save_total_limit=8")
    assert [path.name for path in checkpoints(run)] == [f"checkpoint-{step}" for step in (1, 2, 3, 6)]


def test_a_file_that_is_cut_while_it_is_resumed_from_ends_no_process(bench, run):
    """Nothing of it stays mapped: a read beyond the end of a mapped file is SIGBUS."""
    checkpoint = newest_intact(run)
    state = load_state(checkpoint / "optimizer.safetensors")
    whole = repr(state)

    def read_on():
        for name in ("optimizer.safetensors", "adapter_model.safetensors"):
            os.truncate(checkpoint / name, 0)
        assert repr(state) == whole

    _, status = os.waitpid(forked(read_on, run / "log"), 0)
    assert status == 0, (run / "log").read_text()
    with pytest.raises(RunError, match=r"has changed since it was verified: adapter_model\.safetensors has 0 bytes"):
        bench.trainer(run, *TWO).train(resume_from_checkpoint=str(checkpoint))


def test_a_disk_that_cannot_list_a_checkpoint_costs_that_one(run, monkeypatch):
    first, second = checkpoints(run)
    listed = Path.rglob

    def rglob(path, pattern):
        if path == second:
            raise OSError(5, "Input/output error")
        return listed(path, pattern)

    monkeypatch.setattr(Path, "rglob", rglob)
    assert newest_intact(run) == first


def test_no_whole_checkpoint_is_refused_before_anything_is_loaded(bench, run, monkeypatch):
    for path in checkpoints(run):
        flip(path / "optimizer.safetensors")
    monkeypatch.setattr("smolvlm_exp.training.engine_setup.load_model", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(RequestError, match=r"resume=.*run: none of its checkpoints is intact, so nothing was started"):
        train(bench.config(f"resume={run}"), run)


def test_a_damaged_checkpoint_of_a_later_step_costs_no_good_one(bench, run):
    """Saved over when its step comes again, and not counted among those that are kept."""
    flip(run / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    bench.run(run, *TWO, "trainer.save_total_limit=1")
    assert [path.name for path in checkpoint_folders(run)] == ["checkpoint-2"]
    assert damage(run / "checkpoints" / "checkpoint-2") == ""


# A full disk


def test_a_damaged_checkpoint_of_this_step_is_saved_again(bench, run):
    """As at a signal in the evaluation of a step that an earlier run has saved."""
    last = checkpoints(run)[-1]
    trainer = bench.run(run, *TWO)
    (last / "optimizer.safetensors").unlink()
    trainer.save_now()
    assert damage(last) == ""


def test_a_link_of_a_checkpoints_name_is_replaced(bench, run):
    (run / "checkpoints" / "checkpoint-3").symlink_to("nowhere")
    bench.run(run, *TWO, "trainer.max_steps=3")
    assert damage(run / "checkpoints" / "checkpoint-3") == ""


@pytest.mark.parametrize("manifest", ["[" * 100_000, '{"files": {"run.json": [1e999, ""]}}', '{"files": 1}'])
def test_whatever_a_manifest_holds_it_is_no_traceback(run, manifest):
    newest = checkpoints(run)[-1]
    (newest / files.MANIFEST).write_text(manifest)
    (newest.parent / "checkpoint-²").mkdir()
    assert newest_intact(run).name == "checkpoint-1"


def test_a_full_disk_is_one_error_and_costs_nothing(bench, two, tmp_path):
    """A tmpfs that holds one checkpoint and a part of the next; the run goes on when there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(RunError, match=r"no space left in.*(No space left|os error 28)[\s\S]*from checkpoint-1"):
            bench.run(disk / "run", *TWO)
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["checkpoint-1"]
        assert damage(newest_intact(disk / "run")) == ""
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        bench.run(disk / "run", *TWO)
        compare(disk / "run", two)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_limit_on_file_sizes_is_one_error_and_costs_nothing(bench, two, tmp_path):
    run, before = Path(shutil.copytree(two, tmp_path / "run")), resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # the optimizer's state is larger
    try:
        with pytest.raises(RunError, match=r"no space left in.*(too large|os error 27)[\s\S]*from checkpoint-1"):
            bench.run(run, *TWO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-1"]
    bench.run(run, *TWO)
    compare(run, two)


class Full(TrainerCallback):
    """A disk that is full when the second step is logged, outside of a save."""

    def __init__(self, folder):
        self.folder = folder

    def on_log(self, args, state, control, **kwargs):
        assert not (self.folder / "summary.json").exists()  # it was done, and is not any more
        if state.global_step == 2:
            raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("unseen")
def test_a_job_of_a_sweep_that_a_full_disk_ended_resumes(quick, tmp_path):
    config = quick("trainer.save_strategy=steps", "trainer.save_steps=1")
    (tmp_path / "summary.json").write_text('{"status": "done"}')
    with pytest.raises(RunError, match=r"no space left in[\s\S]*from checkpoint-1, which is intact") as full:
        train(config, tmp_path, watchers=[Full(tmp_path)])
    record_failure(config, tmp_path, full.value)  # as its process does
    assert can_resume(tmp_path)


def compare(run, whole):
    """Both are at their end with the same adapter, to the bit."""
    mine, theirs = (newest_intact(folder) / "adapter_model.safetensors" for folder in (run, whole))
    assert mine.parent.name == theirs.parent.name == "checkpoint-2"
    assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        Exception("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        OSError(5, "Input/output error"),
        OSError(30, "Read-only file system"),
        Exception("I/O error: Input/output error (os error 5)"),
    ],
)
def test_the_guises_of_a_full_and_of_a_bad_disk(error):
    assert files.is_disk_error(error)
    assert not files.is_disk_error(OSError(2, "No such file or directory"))
    assert not files.is_disk_error(RuntimeError("size mismatch"))


@pytest.mark.parametrize(("number", "message"), [(28, "no space left in"), (5, "the disk failed in")])
def test_a_sweep_of_another_task_ends_in_one_line_too(tmp_path, monkeypatch, capsys, number, message):
    def refused(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Grid.__bases__[0], "sweep", refused)
    sweeper = Grid.__new__(Grid)  # Hydra, looking for plugins, imports its own classes again
    target = {"_target_": "hydra_plugins.smolvlm_exp.Grid"}
    sweeper.config = OmegaConf.create(
        {"task": {"name": "evaluate"}, "hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": target}}
    )
    with pytest.raises(SystemExit) as ended:
        sweeper.sweep([])
    assert ended.value.code == 1
    assert f"smolvlm_exp: {message} {tmp_path}" in capsys.readouterr().err


def test_the_disk_that_is_full_is_named(tmp_path, monkeypatch):
    """It may be that of temporary files."""
    elsewhere = tmp_path / "temporary"
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(elsewhere))
    free = {tmp_path: 2**30, elsewhere: 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    full = pytest.raises(RunError, match=rf"no space left in {elsewhere}: .*\(0 MiB free\)")
    with full, files.disk_error_as_run_error(tmp_path):
        raise OSError(28, "No space left on device")


def test_what_hides_a_disk_error_is_one(tmp_path):
    """As Optuna, where the lock of its journal cannot be removed."""
    hiding = RuntimeError("did not possess lock")
    hiding.__context__ = OSError(5, "Input/output error")
    with pytest.raises(RunError, match="the disk failed in"), files.disk_error_as_run_error(tmp_path):
        raise hiding


def test_a_folder_that_is_renamed_while_it_is_written_is_one_error(bench, tmp_path):
    class Mover(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (tmp_path / "run").rename(tmp_path / "moved")

    with pytest.raises(RunError, match="run is gone: it was renamed or removed"):
        bench.run(tmp_path / "run", *TWO, callbacks=(Mover(),))
    assert newest_intact(tmp_path / "moved").name == "checkpoint-1"


def test_what_is_no_disk_error_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError), files.disk_error_as_run_error(tmp_path):
        raise KeyError("a mistake of ours")


def test_a_result_is_whole_or_not_there(tmp_path):
    def half(error):
        with files.atomic_folder(tmp_path / "adapter") as staging:
            (staging / "adapter_model.safetensors").write_bytes(b"half")
            raise error

    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises((RunError, KeyboardInterrupt)):
            half(error)
        assert list(tmp_path.iterdir()) == []
    with files.atomic_folder(tmp_path / "adapter") as staging:
        (staging / "adapter_model.safetensors").write_bytes(b"all")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# Another run's checkpoint


def test_run_json_says_what_the_run_was(two):
    told = json.loads((checkpoints(two)[0] / "run.json").read_text())
    assert told["adapter.r"] == 2
    assert told["trainer.learning_rate"] == 1e-3
    assert "versions.torch" in told
    assert len(told["data.rows"]) == 32
    assert "tracker.type" not in told
