"""Optuna's trials as jobs: totals, abandoned trials, two commands on one study, pruning; once by the real command."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from filelock import FileLock

from smolvlm_exp.config.typed import parsed
from smolvlm_exp.runs.sweep_record import read_jobs
from smolvlm_exp.sweep.launcher import SweepStop
from smolvlm_exp.sweep.optuna_study import (
    JOURNAL,
    SearchConf,
    distribution,
    is_abandoned,
    open_storage,
    open_study,
    require_optuna,
)
from smolvlm_exp.sweep.pruning_callback import pruning_callbacks
from smolvlm_exp.sweep.results import read_results
from smolvlm_exp.sweep.search import Search
from smolvlm_exp.sweep.sweep_page import write_page
from smolvlm_exp.utils.errors import Pruned, RequestError
from tests.conftest import QUICK, compose

SPACE = ["adapter.r=choice(4,8)", "trainer.learning_rate=tag(log,interval(1e-5,1e-3))"]
OPTIONS = {"n_trials": 6, "n_jobs": 2, "storage": None, "seed": 0, "prune": None, "n_startup_trials": 2}


class Launcher:
    """Pretends to run jobs: the metric is the rate's distance from 1e-4. Notes which ran."""

    def __init__(self, folder: Path, status: str = "done", until: int = 100, **more: str) -> None:
        self.folder, self.status, self.until, self.more, self.ran = folder, status, until, more, []

    def launch(self, jobs, first):
        for overrides in jobs:
            values = dict(override.split("=", 1) for override in overrides)
            number = int(values["hydra.sweep.subdir"].strip('"'))
            if len(self.ran) == self.until:
                raise KeyboardInterrupt
            self.ran.append(number)
            value = -abs(float(values["trainer.learning_rate"]) - 1e-4)
            summary = {"status": self.status, "after": {"preference_accuracy": value}, **self.more}
            (self.folder / str(number) / "summary.json").write_text(json.dumps(summary))
        return [SimpleNamespace(return_value=None) for _ in jobs]


def search(folder: Path, launcher: Launcher, **options) -> optuna.Study:
    folder.mkdir(exist_ok=True)
    chosen = SearchConf(**{**OPTIONS, **options})
    study = open_study(folder, chosen, 1, SPACE)
    space = {override.get_key_element(): override for override in parsed(SPACE)}
    with SweepStop(folder) as stop:
        Search(folder, study, chosen, space, ["tracker=none"], compose()).run(launcher, stop)
    return study


@pytest.mark.parametrize("database", [False, True])
def test_a_search_resumes_up_to_n_trials(tmp_path, database):
    storage = f"sqlite:///{tmp_path / 'study.db'}" if database else None
    first = Launcher(tmp_path, until=3)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, first, storage=storage)
    assert first.ran == [0, 1, 2]
    second = Launcher(tmp_path)
    study = search(tmp_path, second, storage=storage)
    assert second.ran == [2, 3, 4, 5], "the interrupted trials come first"
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6
    assert len({trial.params["trainer.learning_rate"] for trial in study.trials}) == 6
    more = Launcher(tmp_path)
    search(tmp_path, more, storage=storage, n_trials=8)
    assert more.ran == [6, 7]
    assert [job.number for job in read_jobs(tmp_path)] == list(range(8))
    page = write_page(read_results(tmp_path, "after.preference_accuracy"), study).read_text()
    assert "Importance of each setting" in page
    assert "best so far" in page


@pytest.mark.parametrize(("status", "state"), [("failed", "FAIL"), ("pruned", "PRUNED")])
def test_failed_and_pruned_trials_count(tmp_path, status, state):
    study = search(tmp_path, Launcher(tmp_path, status))
    assert [trial.state.name for trial in study.trials] == [state] * 6


def test_a_trial_that_the_disk_ended_is_run_again(tmp_path):
    failed = Launcher(tmp_path, "failed", reason="RunError: the disk failed in 0: [Errno 5] Input/output error")
    study = search(tmp_path, failed, n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["RUNNING"]
    again = Launcher(tmp_path)
    assert [trial.state.name for trial in search(tmp_path, again, n_trials=1).trials] == ["COMPLETE"]
    assert again.ran == [0]


def test_a_trial_is_taken_over_only_once_its_command_has_ended(tmp_path):
    study = open_study(tmp_path, SearchConf(**OPTIONS), 1, SPACE)
    trial = study.ask({"x": optuna.distributions.IntDistribution(1, 3)})
    trial.set_user_attr("worker", ".worker-other")
    with FileLock(tmp_path / ".worker-other"):
        assert not is_abandoned(tmp_path, study.trials[0])
    assert is_abandoned(tmp_path, study.trials[0])


def test_what_a_power_failure_left_of_a_trial_is_completed(tmp_path):
    """It ended while the trial was drawn, and within a line of the study's journal."""
    study = open_study(tmp_path, SearchConf(**OPTIONS), 1, SPACE)
    study.ask()
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('{"op_code":5,"worker_id":"2f')
    launcher = Launcher(tmp_path)
    trials = search(tmp_path, launcher, n_trials=3).trials
    assert launcher.ran == [0, 1, 2]
    assert [set(trial.params) for trial in trials] == [{"adapter.r", "trainer.learning_rate"}] * 3
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3


def test_a_folder_with_another_search_is_refused(tmp_path):
    options = SearchConf(**OPTIONS)
    open_study(tmp_path, options, 1, ["adapter.r=choice(4,8)"])
    with pytest.raises(RequestError, match=r"adapter.r=choice\(4,16\) here, adapter.r=choice\(4,8\) there"):
        open_study(tmp_path, options, 1, ["adapter.r=choice(4,16)"])


def test_hydra_s_sweep_syntax_is_the_search_space():
    kinds = [distribution(parsed([f"x={text}"])[0]) for text in ("choice(a,b)", "4,8", "range(1,9,2)", "interval(0,1)")]
    assert kinds[0].choices == ("a", "b")
    assert kinds[1].choices == ("4", "8")
    assert (kinds[2].low, kinds[2].high, kinds[2].step) == (1, 7, 2)
    assert (kinds[3].low, kinds[3].high) == (0, 1)
    logarithmic = distribution(parsed(["x=tag(log,interval(1e-5,1e-3))"])[0])
    assert (logarithmic.log, logarithmic.low) == (True, 1e-5)


def test_without_optuna_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RequestError, match=r"pip install 'smolvlm-exp\[search\]'"):
        require_optuna()


def test_a_trial_below_the_median_is_pruned(tmp_path):
    """Five others reached 0.9 at step 10; 0.1 there ends a trial, 0.95 does not."""
    options = {**OPTIONS, "n_warmup_steps": 0, "prune": "eval_rewards/accuracies"}
    study = open_study(tmp_path, SearchConf(**options), 1, SPACE)
    for _ in range(5):
        other = study.ask()
        other.report(0.9, 10)
        study.tell(other, 0.9)
    trial = study.ask()
    folder, state = tmp_path / "5", SimpleNamespace(global_step=10, max_steps=20)
    folder.mkdir()
    saved = {"study": study.study_name, "trial": trial._trial_id, **options}
    (folder / "trial.json").write_text(json.dumps(saved))
    (callback,) = pruning_callbacks(folder)
    callback.on_evaluate(None, state, None, metrics={"eval_rewards/accuracies": 0.95})
    (folder / "trial.json").write_text(json.dumps({**saved, "trial": study.ask()._trial_id}))
    (worse,) = pruning_callbacks(folder)
    with pytest.raises(Pruned, match="at step 10 is worse"):
        worse.on_evaluate(None, state, None, metrics={"eval_rewards/accuracies": 0.1})
    with pytest.raises(RequestError, match="not evaluated"):
        callback.on_evaluate(None, state, None, metrics={"eval_loss": 0.1})
    assert pruning_callbacks(tmp_path) == []


@pytest.mark.slow
def test_twelve_trials_killed_after_five_and_finished_by_two_commands(tmp_path):
    """The real command: pruning, kill -9 of everything, two commands on one study, 12 trials in all."""
    settings = [s for s in QUICK if not s.startswith(("trainer.max", "trainer.save", "trainer.per_device_train"))]
    few = ["data.train_rows=64", "trainer.save_steps=2", "hydra.sweeper.n_startup_trials=2"]
    space = ["hydra.sweeper.prune=eval_rewards/margins", "hydra.sweeper.seed=3"]
    command = [sys.executable, "-m", "smolvlm_exp", "-m", "experiment=search_rank_lr_beta", *settings, *few, *space]

    def ended() -> int:
        found = tmp_path.glob("outputs/sweeps/*/*/*/summary.json")
        return sum(json.loads(path.read_text())["status"] in ("done", "pruned") for path in found)

    out = (tmp_path / "out.txt").open("w")
    running = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True)
    while ended() < 5 and running.poll() is None:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    (sweep,) = tmp_path.glob("outputs/sweeps/*/*")
    before = {path: path.stat().st_mtime for path in sweep.glob("*/summary.json")}

    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    two = [subprocess.Popen([*command, f"sweep={sweep}"], cwd=tmp_path, **pipes) for _ in range(2)]
    try:
        printed = [process.communicate(timeout=400)[0] for process in two]
    finally:
        for process in two:
            process.kill()
    assert [process.returncode for process in two] == [0, 0], printed
    jobs = [json.loads((sweep / str(n) / "summary.json").read_text()) for n in range(12)]
    assert not (sweep / "12").exists()
    states = [job["status"] for job in jobs]
    assert set(states) == {"done", "pruned"}, states
    assert all(path.stat().st_mtime == time for path, time in before.items()), "finished trials were left alone"
    assert all(any(f"[{n}] " in text for n in range(5, 12)) for text in printed), "both ran trials"
    study = optuna.load_study(study_name="search", storage=open_storage(sweep, None))
    expected = [{"done": "COMPLETE", "pruned": "PRUNED"}[state] for state in states]
    assert [trial.state.name for trial in study.trials] == expected
    page = (sweep / "sweep.html").read_text()
    assert "Importance of each setting" in page
    assert "best so far" in page


def test_a_command_killed_while_it_wrote_to_the_journal_holds_up_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("sweep")  # relative, as by default
    folder.mkdir()
    open_study(folder, SearchConf(**OPTIONS), 1, SPACE)
    code = f"""
import os, pathlib, signal, sys
from smolvlm_exp.sweep.optuna_study import open_storage
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # Optuna's last call of a write, under its lock
open_storage(pathlib.Path({str(folder)!r}), None).create_new_study([], "killed")
"""
    killed = subprocess.run([sys.executable, "-c", code])
    assert killed.returncode == -signal.SIGKILL
    began = time.monotonic()
    study = open_study(folder, SearchConf(**OPTIONS), 1, SPACE)
    study.tell(study.ask(), 1.0)
    assert time.monotonic() - began < 10, "Optuna's own lock takes 30 seconds or, by a relative path, forever"


@pytest.mark.parametrize("database", [False, True])
def test_commands_that_create_a_study_at_once_share_it(tmp_path, database):
    storage = f"sqlite:///{tmp_path / 'study.db'}" if database else None
    together = threading.Barrier(6)

    def create(_):
        together.wait()
        return open_study(tmp_path, SearchConf(**{**OPTIONS, "storage": storage}), 1, SPACE).study_name

    with ThreadPoolExecutor(6) as threads:
        assert len(set(threads.map(create, range(6)))) == 1


def test_a_database_that_cannot_be_opened_is_named(tmp_path):
    for storage in (f"sqlite:///{tmp_path}", "mysql+nothing://a/b", "x"):
        with pytest.raises(RequestError, match=r"hydra\.sweeper\.storage="):
            open_study(tmp_path, SearchConf(**{**OPTIONS, "storage": storage}), 1, SPACE)


def test_a_search_of_no_trials_is_refused(command):
    refused = command("-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=0", "adapter.r=choice(4,8)")
    assert refused.returncode != 0
    assert "hydra.sweeper.n_trials=0 is too small: 1 is the least." in refused.stderr
    assert "Traceback" not in refused.stderr
