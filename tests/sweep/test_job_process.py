"""A job in a process of its own, where it cannot be forked: as on every machine with a GPU."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from smolvlm_exp.sweep import job_process


@pytest.mark.slow
def test_a_spawned_job_runs_and_records_its_result(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(job_process, "can_fork", lambda: False)
    folder = tmp_path / "0"
    folder.mkdir()
    job_process.run_in_process(quick(), folder, Path.cwd(), at_once=2)
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    assert "step 3/3" in (folder / "output.log").read_text()
    other = tmp_path / "1"
    other.mkdir()
    job_process.run_in_process(quick("adapter.target=nothing_like_it"), other, Path.cwd(), at_once=1)
    failed = json.loads((other / "summary.json").read_text())
    assert failed["exit_code"] == 1
    assert "matches no linear layer" in failed["reason"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1, "its process ended with exit code 1"), (-9, "killed by SIGKILL"), (-11, "killed by SIGSEGV")],
)
def test_the_reason_of_a_process_s_end_is_described(code, reason):
    assert job_process.describe_exit(code).startswith(reason)


def test_a_full_disk_takes_the_log_and_not_the_job(capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    tee = job_process.Tee(sys.stdout, SimpleNamespace(write=full, flush=full), "[0] ")
    print("step 1/2", file=tee, flush=True)
    assert capsys.readouterr().out == "[0] step 1/2\n"
