"""Grids by the command people type: what they announce, share, survive, resume and leave behind."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.conftest import QUICK, read_lines

SHORT = [s for s in QUICK if not s.startswith(("trainer.save", "trainer.max", "tracker"))]
SHORT += ["trainer.max_steps=2", "data.train_rows=8", "data.test_rows=4", "task.max_new_tokens=4"]
LONG = [*SHORT, "tracker=none", "trainer.max_steps=14", "trainer.save_steps=2", "keep_checkpoints=all"]
WANDB = str(Path(sys.executable).parent / "wandb")


def rows_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[tuple[int, float]]:
    """Every logged (step, loss), repetitions too."""
    return [(event["step"], event["loss"]) for event in read_lines(folder / "metrics.jsonl") if "loss" in event]


@pytest.fixture
def start(tmp_path):
    """Starts a sweep in the background, in a process group of its own that is killed after the test."""
    with contextlib.ExitStack() as stack:

        def started(*arguments: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "smolvlm_exp", *arguments]
            out = (tmp_path / "out.txt").open("w")
            process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(kill_group, process)
            return process

        yield started


def kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("timed out")


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


def test_the_plan_is_announced_before_the_first_job(whole):
    _, sweep, out = whole
    before = out[: out.index("[0]")]
    assert f"sweep: 4 jobs in outputs/sweeps/{sweep.parent.name}/{sweep.name}" in before
    assert re.search(r"adapter\.r +2, 4\n", before)
    assert re.search(r"seed +0, 1 +\(repetitions\)", before)
    assert "estimated time: unknown until the first job finishes" in before
    assert re.search(r"\[0\] done; 3 of 4 jobs left, about \d+", out)


def test_image_features_and_reference_are_computed_by_the_first_job_alone(whole):
    _, _, out = whole
    assert "[0] reference: 8 rows, 8 of them computed" in out
    assert out.count("reference: 8 rows, 0 of them computed") == 3
    assert len(re.findall(r"features of 8 images: .* in outputs/cache", out)) == 4


def test_the_table_has_every_job_s_results(whole):
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


def wandb_record(run: Path, kind: str) -> dict:
    """The record of this kind that W&B's own command finds in an offline run, once W&B's own process has written it."""
    command = [WANDB, "leet", "inspect", "--json", str(run)]

    def found() -> list[dict]:
        read = subprocess.run(command, capture_output=True, text=True, timeout=180)
        records = (json.loads(line) for line in read.stdout.splitlines() if line.startswith("{"))
        return [record[kind] for record in records if record.get("type") == kind]

    return wait_for(found)[0]


def test_wandb_has_a_group_with_names_tags_and_a_table(whole):
    _, sweep, out = whole
    assert out.count("wandb sync") == 1
    headers = {str(run.parent): wandb_record(run, "run") for run in sweep.glob("**/offline-run-*")}
    assert len(headers) == 5
    assert all(f"sweep {sweep.parent.name} {sweep.name}" in json.dumps(header) for header in headers.values())
    jobs = [header for header in headers.values() if '"train"' in json.dumps(header)]
    text = "\n".join(map(json.dumps, jobs))
    places = [f'"r={r} seed={seed} {sweep.name}/{2 * i + seed}"' for i, r in enumerate((2, 4)) for seed in (0, 1)]
    assert all(text.count(place) == 1 for place in places)
    assert {job["config"]["update"]["sweep"] for job in jobs} == {f"sweep {sweep.parent.name} {sweep.name}"}
    assert all('"r=2"' in json.dumps(job) or '"r=4"' in json.dumps(job) for job in jobs)
    alike = [job["config"]["update"]["without_seed"] for job in jobs]
    assert sorted(alike) == ["r=2", "r=2", "r=4", "r=4"]  # task=compare's groups
    assert list(sweep.glob("wandb/offline-run-*/files/media/table/sweep*.table.json"))


def test_a_finished_sweep_is_left_alone_and_reported_again(whole, command):
    folder, sweep, _ = whole
    before = {path: path.stat().st_mtime for path in sweep.glob("*/summary.json")}
    done = command("-m", "sweep=last", "metric=train.last_loss", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "4 done" in done.stdout
    assert "nothing is left to run" in done.stdout
    assert {path: path.stat().st_mtime for path in sweep.glob("*/summary.json")} == before
    (best,) = (row for row in rows_of(sweep) if row["best"] == "True")
    assert float(best["train.last_loss"]) == min(float(row["train.last_loss"]) for row in rows_of(sweep))


def test_resuming_with_other_jobs_is_refused(whole, command):
    folder, sweep, _ = whole
    done = command("-m", "sweep=last", "adapter.r=2,8", cwd=folder)
    assert done.returncode == 2
    assert "adapter.r is 2, 8 here and 2, 4 there" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(rows_of(sweep)) == 4


def test_a_job_that_fails_does_not_stop_the_others(command, command_server, tmp_path):
    """One job raises, one is killed; sweep.csv gives the reasons."""
    grid = ["adapter.r=2,3,1000000000000"]
    with ThreadPoolExecutor() as pool:
        words = ["-m", *LONG, "trainer.max_steps=4", *grid, "tracker=wandb"]
        running = pool.submit(command, *words, env={"FORK_JOBS": "1"}, timeout=120)
        sweep = wait_for(lambda: next(tmp_path.glob("outputs/sweeps/*/*"), None))
        wait_for(lambda: at_step(sweep, 1, 2))
        children = psutil.Process(command_server.child).children(recursive=True)
        lock = str(sweep / "1" / ".lock")
        (job,) = (child for child in children if lock in {file.path for file in child.open_files()})
        job.send_signal(signal.SIGKILL)
        done = running.result()
    assert done.returncode == 1
    assert [row["status"] for row in rows_of(sweep)] == ["done", "failed", "failed"]
    none, killed, raised = (row["reason"] for row in rows_of(sweep))
    assert none == ""
    assert "killed by SIGKILL" in killed
    assert "GiB are free" in raised
    assert "[1] failed: killed by SIGKILL" in done.stdout
    assert "GiB are free" in (sweep / "2" / "output.log").read_text()
    ends = [wandb_record(next((sweep / job).glob("wandb/offline-run-*")), "exit") for job in ("0", "2")]
    assert [end.get("exit_code", 0) for end in ends] == [0, 1]

    before = (sweep / "0" / "summary.json").stat().st_mtime
    done = command("-m", "sweep=last", env={"FORK_JOBS": "1"})
    assert done.returncode == 1
    assert {row["job"] for row in rows_of(sweep) if row["status"] == "done"} == {"0", "1"}
    assert (sweep / "0" / "summary.json").stat().st_mtime == before
    assert [step for step, _ in losses(sweep / "1")].count(1) == 1, "it was resumed from its checkpoint"


@pytest.mark.slow
def test_a_sweep_that_was_stopped_and_killed_ends_with_the_same_table(start, command, tmp_path):
    """Ctrl-C in the first job, kill -9 of everything in the second."""
    grid = ["adapter.r=2,4"]
    done = command("-m", *LONG, *grid, "hydra.sweep.dir=whole")
    assert done.returncode == 0, done.stderr
    running = start("-m", *LONG, *grid)
    sweep = wait_for(lambda: next(tmp_path.glob("outputs/sweeps/*/*"), None))
    wait_for(lambda: at_step(sweep, 0, 2))
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=120) == 75
    out = (tmp_path / "out.txt").read_text()
    assert f"-m sweep=outputs/sweeps/{sweep.parent.name}/{sweep.name}" in out
    assert [row["status"] for row in rows_of(sweep)] == ["stopped", "missing"]

    running = start("-m", *LONG, *grid, "sweep=last")
    wait_for(lambda: at_step(sweep, 1, 4))
    kill_group(running)
    running.wait()
    first = (sweep / "0" / "summary.json").stat().st_mtime
    done = command("-m", "sweep=last")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (sweep / "0" / "summary.json").stat().st_mtime == first

    def table(folder: Path) -> list[dict[str, str]]:
        columns = ("job", "status", "adapter.r", "before.", "after.", "train.last_loss", "train.steps", "best")
        return [{k: v for k, v in row.items() if k.startswith(columns)} for row in rows_of(folder)]

    assert table(sweep) == table(tmp_path / "whole")
    for job in ("0", "1"):
        assert dict(losses(sweep / job)) == dict(losses(tmp_path / "whole" / job))
