"""A job in a process of its own, where it cannot be forked: as on every machine with a GPU."""

import json
from pathlib import Path

import pytest

from smolvlm_exp.sweep import job_process as isolation


@pytest.mark.slow
def test_a_spawned_job_runs_and_tells(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "can_fork", lambda: False)
    folder = tmp_path / "0"
    folder.mkdir()
    summary = isolation.run_in_process(quick(), folder, Path.cwd(), at_once=2)
    assert summary["status"] == "done"
    assert summary == json.loads((folder / "summary.json").read_text())
    assert "step 3/3" in (folder / "output.log").read_text()
    other = tmp_path / "1"
    other.mkdir()
    failed = isolation.run_in_process(quick("adapter.target=nothing_like_it"), other, Path.cwd(), at_once=1)
    assert failed["exit_code"] == 1
    assert "matches no linear layer" in failed["reason"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1, "its process ended with exit code 1"), (-9, "killed by SIGKILL"), (-11, "killed by SIGSEGV")],
)
def test_what_a_process_died_of_is_told(code, reason):
    assert isolation.describe_exit(code).startswith(reason)
