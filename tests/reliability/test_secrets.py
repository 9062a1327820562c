"""Secrets and folders: nothing private gets out of a run, and no other process or run writes into its folder."""

import os
import signal
import time

import pytest

from smolvlm_exp.runs import folder as folders
from smolvlm_exp.runs.folder import check_unused, lock_run_folder
from smolvlm_exp.utils.errors import RequestError
from tests.reliability.conftest import TOKEN, forked, typed

# Secrets


@pytest.mark.parametrize(
    "override",
    [
        f"+trainer.extra.hub_token={TOKEN}",
        "+trainer.extra.hub_token=whatever",
        f"name={TOKEN}",
        "+model.extra.token=abc",
        "+hydra.job.env_set.WANDB_API_KEY=abc",
        "name=${oc.env:WANDB_API_KEY}",
        "name='https://me:secret@example.com/x'",
        "tracker.tags=[held-by-the-environment-0123]",
    ],
)
def test_a_secret_in_a_setting_is_refused(override, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "held-by-the-environment-0123")
    with pytest.raises(RequestError, match="is a secret") as refusal:
        typed(override)
    assert TOKEN not in str(refusal.value)
    assert "0123" not in str(refusal.value)


def test_what_only_looks_like_one_is_not():
    typed("model.revision=0123456789abcdef0123456789abcdef01234567", "name=hf_small")


def test_no_secret_of_the_environment_is_in_a_run(built):
    files = [path for path in built.rglob("*") if path.is_file()]
    assert len(files) >= 10
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


# Folders


def test_a_folder_is_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.2)
    ready = tmp_path / "ready"

    def hold():
        with lock_run_folder(tmp_path):
            ready.touch()
            time.sleep(60)

    child = forked(hold, tmp_path / "log")
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(RequestError, match="is in use: another process"), lock_run_folder(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with lock_run_folder(tmp_path):  # whoever dies lets go
        pass


@pytest.mark.parametrize("name", folders.RUN_FILES)
def test_another_runs_folder_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(RequestError, match=f"already holds a run \\({name}\\)"):
        check_unused(tmp_path, "train")
    check_unused(tmp_path / "new" / "one", "train")


def test_the_command_leaves_another_runs_folder_as_it_was(command, tmp_path):
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").write_text("as it was")
    (run / "metrics.jsonl").write_text("{}\n")
    done = command("tracker=none", "hydra.run.dir=run")
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert (run / ".hydra" / "config.yaml").read_text() == "as it was"


# What is stored

KINDS = (
    ".safetensors",
    ".json",
    ".jsonl",
    ".html",
    ".md",
    ".yaml",
    ".csv",
    ".txt",
    ".log",
    ".lock",
    ".onnx",
    ".jinja",
    ".wandb",
)
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # how they begin, in a zip or not


@pytest.mark.slow
def test_all_that_is_stored_is_plain_and_holds_no_secret(command, tmp_path):
    """A sweep of two jobs with W&B and its cache, then an export in every format, where the environment has secrets."""
    secrets = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "WANDB_MODE": "offline"}
    brief = ("trainer.max_steps=2", "trainer.save_steps=1", "data.train_rows=16", "data.test_rows=8")
    done = command("-m", *brief, "adapter.r=2,4", "hydra.sweep.dir=sweep", "keep_checkpoints=all", env=secrets)
    assert done.returncode == 0, done.stderr[-3000:]
    asked = ("task=export", "run=sweep/0", "export.format=all", "export.precision=int8", "export.on_fail=mark")
    exported = command(*asked, "hydra.run.dir=export", env=secrets)
    assert exported.returncode == 0, exported.stderr[-3000:]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".safetensors", ".json", ".onnx", ".wandb"} <= {path.suffix for path in files}
    assert len(list((tmp_path / "outputs" / "cache").rglob("*.safetensors"))) >= 1
    assert [path for path in files if path.suffix not in KINDS and path.name != ".lock"] == []
    for path in files:
        data = path.read_bytes()
        assert not data.startswith(PICKLES), path
        assert not [name for name in ("HF_TOKEN", "WANDB_API_KEY") if secrets[name].encode() in data], path
    for told in (done, exported):
        assert TOKEN not in told.stdout + told.stderr
    print(f"{len(files)} files looked through")
