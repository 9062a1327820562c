"""Grids by the command people type: what they announce, share, survive, go on with and leave behind."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import QUICK, read_lines

SHORT = [s for s in QUICK if not s.startswith(("trainer.save", "trainer.max", "tracker"))]
SHORT += ["trainer.max_steps=2", "data.test_rows=4"]
LONG = [*SHORT, "tracker=none", "trainer.max_steps=14", "trainer.save_steps=2", "keep_checkpoints=all"]
WANDB = str(Path(sys.executable).parent / "wandb")


def rows_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[tuple[int, float]]:
    """Every logged (step, loss), repetitions too."""
    return [(event["step"], event["loss"]) for event in read_lines(folder / "metrics.jsonl") if "loss" in event]


@pytest.fixture
def begun(tmp_path):
    """Begins a sweep that runs on, alone in its process group; what is left of it ends with the test."""
    running = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "smolvlm_exp", *arguments]
        out = (tmp_path / "out.txt").open("w")
        running.append(
            subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, text=True, start_new_session=True)
        )
        return running[-1]

    yield begin
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come")


def at_step(sweep: Path, job: int, step: int) -> bool:
    return (sweep / str(job) / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").is_file()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command_server):
    """Two ranks, two seeds, with W&B: (folder the command was typed in, the sweep's folder, what was printed)."""
    folder = tmp_path_factory.mktemp("whole")
    env = {**os.environ, "HOME": str(folder), "NETRC": str(folder / "none")}
    grid = ["adapter.r=2,4", "seed=0,1", "trainer.save_steps=1", "trainer.learning_rate=1e-3"]
    done = command_server.run(["-m", *SHORT, *grid, "tracker=wandb"], folder, env, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (sweep,) = (folder / "outputs" / "sweeps").glob("*/*")
    return folder, sweep, done.stdout


def test_it_says_what_it_will_do_before_the_first_job(whole):
    _, sweep, out = whole
    before = out[: out.index("[0]")]
    assert f"sweep: 4 jobs in outputs/sweeps/{sweep.parent.name}/{sweep.name}" in before
    assert re.search(r"adapter\.r +2, 4\n", before)
    assert re.search(r"seed +0, 1 +\(repetitions\)", before)
    assert "estimated time: unknown until the first job finishes" in before
    assert re.search(r"\[0\] done; 3 of 4 jobs left, about \d+", out)


def test_jobs_share_pictures_and_reference(whole):
    """Computed by the first job, read by the others."""
    _, _, out = whole
    assert "[0] reference: 32 rows, 32 of them computed" in out
    assert out.count("reference: 32 rows, 0 of them computed") == 3
    assert len(re.findall(r"features of 32 images: .* in outputs/cache", out)) == 4


def test_the_table_holds_every_job(whole):
    _, sweep, out = whole
    rows = rows_of(sweep)
    assert [(row["adapter.r"], row["seed"]) for row in rows] == [("2", "0"), ("2", "1"), ("4", "0"), ("4", "1")]
    assert {row["status"] for row in rows} == {"done"}
    for row in rows:
        summary = json.loads((sweep / row["job"] / "summary.json").read_text())
        assert float(row["after.preference_accuracy"]) == summary["after"]["preference_accuracy"]
        assert summary["train"]["trainable_parameters"] == (36864 if row["adapter.r"] == "2" else 66048)
    assert len({row["train.last_loss"] for row in rows}) == 4
    (best,) = (row for row in rows if row["best"] == "True")
    assert float(best["after.preference_accuracy"]) == max(float(row["after.preference_accuracy"]) for row in rows)
    assert best["command"] in out
    assert f"adapter.r={best['adapter.r']}" in best["command"]


def test_only_the_best_keeps_a_checkpoint_and_all_keep_their_adapter(whole):
    _, sweep, _ = whole
    (best,) = (row["job"] for row in rows_of(sweep) if row["best"] == "True")
    left = [path.relative_to(sweep).parts[0] for path in sweep.glob("*/checkpoints/checkpoint-*")]
    assert left == [best]
    assert len(list(sweep.glob("*/adapter/adapter_model.safetensors"))) == 4
    assert len(list(sweep.glob("*/report.html"))) == 4


def test_wandb_reads_back_a_group_with_names_tags_and_a_table(whole):
    """With W&B's own command, from the offline files."""
    _, sweep, out = whole
    assert out.count("wandb sync") == 1
    runs = sorted(sweep.glob("**/offline-run-*/run-*.wandb"))
    headers = [header(run.parent) for run in runs]
    assert len(headers) == 5
    text = [json.dumps(h) for h in headers]
    assert all(f"sweep {sweep.parent.name} {sweep.name}" in t for t in text)
    jobs = [t for t in text if '"train"' in t]
    assert len(jobs) == 4
    names = {f"r={r} seed={seed}" for r in (2, 4) for seed in (0, 1)}
    assert {next(name for name in names if f'"{name}"' in t) for t in jobs} == names
    assert all('"r=2"' in t or '"r=4"' in t for t in jobs)
    alike = [h["run"]["config"]["update"]["without_seed"] for h in headers if '"train"' in json.dumps(h)]
    assert sorted(alike) == ["r=2", "r=2", "r=4", "r=4"]  # task=compare's groups
    assert list(sweep.glob("wandb/offline-run-*/files/media/table/sweep*.table.json"))


def records(run: Path) -> list[dict]:
    """What W&B's own command finds in an offline run."""
    read = subprocess.run([WANDB, "leet", "inspect", "--json", str(run)], capture_output=True, text=True, timeout=180)
    return [json.loads(line) for line in read.stdout.splitlines() if line.startswith("{")]


def header(run: Path) -> dict:
    return next(record for record in records(run) if record.get("type") == "run")


def exit_code(job: Path) -> int:
    (run,) = job.glob("wandb/offline-run-*")
    (end,) = (record["exit"] for record in records(run) if record.get("type") == "exit")
    return end.get("exit_code", 0)


def test_a_sweep_that_is_done_is_left_alone_and_told_again(whole, command):
    folder, sweep, _ = whole
    before = {path: path.stat().st_mtime for path in sweep.glob("*/summary.json")}
    done = command("-m", "sweep=last", "metric=train.last_loss", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "4 done" in done.stdout
    assert "nothing is left to run" in done.stdout
    assert {path: path.stat().st_mtime for path in sweep.glob("*/summary.json")} == before
    (best,) = (row for row in rows_of(sweep) if row["best"] == "True")
    assert float(best["train.last_loss"]) == min(float(row["train.last_loss"]) for row in rows_of(sweep))


def test_another_command_is_told_what_differs(whole, command):
    folder, sweep, _ = whole
    done = command("-m", "sweep=last", "adapter.r=2,8", cwd=folder)
    assert done.returncode == 2
    assert "adapter.r is 2, 8 here and 2, 4 there" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(rows_of(sweep)) == 4


def test_what_fails_costs_itself_alone(begun, command, tmp_path):
    """One job raises, one runs out of memory, one is killed: the others are done, and each reason is told."""
    grid = ["adapter.r=2,3,1000000000000,1000000000000000000000000"]
    running = begun("-m", *LONG, "trainer.max_steps=8", *grid, "tracker=wandb")
    sweep = wait_for(lambda: next(tmp_path.glob("outputs/sweeps/*/*"), None))
    wait_for(lambda: at_step(sweep, 1, 2))
    children = psutil.Process(running.pid).children(recursive=True)
    lock = str(sweep / "1" / ".lock")
    (job,) = (child for child in children if lock in {file.path for file in child.open_files()})
    job.send_signal(signal.SIGKILL)
    assert running.wait(timeout=120) == 1
    told = {row["job"]: (row["status"], row["reason"]) for row in rows_of(sweep)}
    assert told["0"] == ("done", "")
    assert [status for status, _ in told.values()] == ["done", "failed", "failed", "failed"]
    assert told["1"][1].startswith("killed by SIGKILL")
    assert "can't allocate memory" in told["2"][1]
    assert "Overflow" in told["3"][1]
    out = (tmp_path / "out.txt").read_text()
    assert "[1] failed: killed by SIGKILL" in out
    assert "Overflow" in (sweep / "3" / "output.log").read_text()
    assert [exit_code(sweep / job) for job in ("0", "2", "3")] == [0, 1, 1]

    before = (sweep / "0" / "summary.json").stat().st_mtime
    done = command("-m", "sweep=last")
    assert done.returncode == 1
    assert {row["job"] for row in rows_of(sweep) if row["status"] == "done"} == {"0", "1"}
    assert (sweep / "0" / "summary.json").stat().st_mtime == before
    assert [step for step, _ in losses(sweep / "1")].count(1) == 1, "it went on from its checkpoint"


@pytest.mark.slow
def test_stopped_then_killed_it_ends_with_the_same_table(begun, command, tmp_path):
    """Ctrl-C in the first job, kill -9 of everything in the second: in the end as if nothing had happened."""
    grid = ["adapter.r=2,4"]
    done = command("-m", *LONG, *grid, "hydra.sweep.dir=whole")
    assert done.returncode == 0, done.stderr
    running = begun("-m", *LONG, *grid)
    sweep = wait_for(lambda: next(tmp_path.glob("outputs/sweeps/*/*"), None))
    wait_for(lambda: at_step(sweep, 0, 2))
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=120) == 75
    out = (tmp_path / "out.txt").read_text()
    assert f"-m sweep=outputs/sweeps/{sweep.parent.name}/{sweep.name}" in out
    assert [row["status"] for row in rows_of(sweep)] == ["stopped", "missing"]

    running = begun("-m", *LONG, *grid, "sweep=last")
    wait_for(lambda: at_step(sweep, 1, 4))
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    first = (sweep / "0" / "summary.json").stat().st_mtime
    done = command("-m", "sweep=last")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (sweep / "0" / "summary.json").stat().st_mtime == first

    def told(folder: Path) -> list[dict[str, str]]:
        kept = ("job", "status", "adapter.r", "before.", "after.", "train.last_loss", "train.steps", "best")
        return [{k: v for k, v in row.items() if k.startswith(kept)} for row in rows_of(folder)]

    assert told(sweep) == told(tmp_path / "whole")
    for job in ("0", "1"):
        assert dict(losses(sweep / job)) == dict(losses(tmp_path / "whole" / job))
