"""Where jobs run: every option composes, and the same small sweep on each that this machine can have."""

import csv
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.paths import CONF
from tests.conftest import QUICK, compose

LAUNCHERS = sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml"))
NOT_NICE = {"RAY_worker_niceness": "0"}  # Ray's jobs give way to all others, which on a busy machine takes for ever
SMALL = [s for s in QUICK if not s.startswith("trainer.max")] + ["trainer.max_steps=2", "adapter.r=2,4"]
with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def statuses(folder: Path) -> list[str]:
    (sweep,) = folder.glob("outputs/sweeps/*/*")
    with (sweep / "sweep.csv").open() as file:
        return [row["status"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("launcher", ["basic", *LAUNCHERS])
def test_every_launcher_composes_or_says_what_to_install(launcher):
    if launcher.startswith("ray") and find_spec("ray") is None:
        with pytest.raises(RequestError, match=r"pip install 'smolvlm-exp\[ray\]'"):
            compose(f"hydra/launcher={launcher}")
    else:
        compose(f"hydra/launcher={launcher}", "adapter.r=2,4", multirun=True)


def test_a_launcher_that_fails_is_reported_with_the_table(command, tmp_path):
    if shutil.which("srun"):
        pytest.skip("there is a Slurm here")
    done = command("-m", "hydra/launcher=slurm", "adapter.r=2,4", "tracker=none")
    assert done.returncode == 1
    assert 'the launcher failed: Could not detect "srun"' in done.stdout
    assert statuses(tmp_path) == ["missing", "missing"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "log"), [("parallel", None), ("submitit", ".submitit")])
def test_jobs_run_in_parallel_on_one_machine(command, tmp_path, launcher, log):
    many = ["hydra.launcher.n_jobs=2"] if launcher == "parallel" else []
    done = command("-m", *SMALL, f"hydra/launcher={launcher}", *many)
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(tmp_path) == ["done", "done"]
    logs = [path.read_text() for path in tmp_path.glob("outputs/sweeps/*/*/*/output.log")]
    computed = sum("8 rows, 8 of them computed" in text for text in logs)
    assert computed == 1, "of jobs that need the same reference at once, one computes it"
    if log:
        assert list(tmp_path.glob(f"outputs/sweeps/*/*/{log}"))


@pytest.mark.slow
@with_ray
def test_jobs_run_on_a_local_ray(command, tmp_path):
    done = command("-m", *SMALL, "hydra/launcher=ray_local", env=NOT_NICE, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(tmp_path) == ["done", "done"]


@pytest.mark.slow
@with_ray
def test_jobs_run_on_an_existing_ray_cluster(command, tmp_path):
    """A cluster on loopback, started in another folder than the command's."""
    ray = str(Path(sys.executable).parent / "ray")
    away = tmp_path / "away"
    away.mkdir()
    temporary = tempfile.mkdtemp(prefix="ray-")  # not tmp_path: its sockets' names must be short
    options = f"--node-ip-address=127.0.0.1 --port=0 --num-cpus=2 --include-dashboard=false --temp-dir={temporary}"
    started = subprocess.run(
        [ray, "start", "--head", *options.split()], cwd=away, capture_output=True, text=True, timeout=120
    )
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        loopback = "+hydra.launcher.ray.init._node_ip_address=127.0.0.1"
        done = command("-m", *SMALL, "hydra/launcher=ray_cluster", loopback, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        assert statuses(tmp_path) == ["done", "done"]
    finally:
        subprocess.run([ray, "stop"], capture_output=True, timeout=120)
        shutil.rmtree(temporary, ignore_errors=True)
