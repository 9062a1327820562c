"""What a sweep concludes, by hand-made results: the best, main effects and intervals, the Pareto front."""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from smolvlm_exp.evaluation.comparison import save_per_row
from smolvlm_exp.evaluation.statistics import mean
from smolvlm_exp.runs.sweep_record import (
    Job,
    can_resume,
    check_same_jobs,
    differing_settings,
    job_label,
    job_state,
    write_jobs,
)
from smolvlm_exp.sweep.devices import free_gpu, visible_gpus
from smolvlm_exp.sweep.results import main_effects, prune_checkpoints, read_results, results_table
from smolvlm_exp.sweep.sweep_page import write_page
from smolvlm_exp.tasks.time_estimate import estimate_time
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.formatting import short_keys
from tests.conftest import compose

METRIC = "after.preference_accuracy"


def made(folder: Path, results: dict[tuple[str, ...], dict]):
    """A sweep with these jobs, override lists -> (metric, seconds, GiB), or a complete summary."""
    jobs = [Job(number, overrides) for number, overrides in enumerate(results)]
    write_jobs(folder, jobs, list(differing_settings(jobs)))
    for job, result in zip(jobs, results.values(), strict=True):
        (folder / str(job.number)).mkdir()
        if isinstance(result, tuple):
            value, seconds, memory = result
            train = {"seconds": seconds, "memory_peak_gib": memory}
            result = {"status": "done", "after": {"preference_accuracy": value}, "train": train}
        (folder / str(job.number) / "summary.json").write_text(json.dumps(result))
    return read_results(folder, METRIC)


def grid(values: dict[tuple[str, str, str], float]) -> dict[tuple[str, ...], tuple[float, float, float]]:
    return {
        (f"adapter.r={r}", f"trainer.learning_rate={rate}", f"seed={seed}"): (value, 10, 1)
        for (r, rate, seed), value in values.items()
    }


def test_main_effects_are_means_over_other_settings_with_t_intervals_over_seeds(tmp_path):
    values = {
        ("4", "1e-4", "0"): 0.50, ("4", "1e-3", "0"): 0.70, ("8", "1e-4", "0"): 0.60, ("8", "1e-3", "0"): 0.80,
        ("4", "1e-4", "1"): 0.54, ("4", "1e-3", "1"): 0.74, ("8", "1e-4", "1"): 0.60, ("8", "1e-3", "1"): 0.80,
    }  # fmt: skip
    effects = main_effects(made(tmp_path, grid(values)))
    assert list(effects) == ["adapter.r", "trainer.learning_rate"], "seeds are repetitions, not a setting"
    four, eight = effects["adapter.r"]
    assert (four.value, four.seeds, four.jobs) == ("4", 2, 4)
    assert four.mean == pytest.approx(0.62)
    assert four.interval == pytest.approx(12.706 * 0.0282843 / 2**0.5, rel=1e-4)  # t of one degree of freedom
    assert eight.mean == pytest.approx(0.70)
    assert eight.interval == pytest.approx(0)


def test_main_effects_leave_out_combinations_with_a_missing_run(tmp_path):
    values = {("4", "1e-4", "0"): 0.5, ("4", "1e-3", "0"): 0.9, ("8", "1e-4", "0"): 0.6}
    missing = {("adapter.r=8", "trainer.learning_rate=1e-3", "seed=0"): {"status": "failed", "reason": "x"}}
    results = made(tmp_path, grid(values) | missing)
    four, eight = main_effects(results)["adapter.r"]
    assert (four.mean, eight.mean) == (0.5, 0.6), "not (0.7, 0.6)"
    assert four.interval is None
    assert results.failed()


def test_the_best_job_and_the_pareto_front(tmp_path):
    results = {("r=1",): (0.8, 10, 2.0), ("r=2",): (0.9, 20, 2.0), ("r=3",): (0.9, 30, 3.0), ("r=4",): (0.7, 30, 1.0)}
    rows = results_table(made(tmp_path, results))
    assert [row["best"] for row in rows] == [False, True, False, False]
    assert [row["pareto"] for row in rows] == [True, True, False, True]
    assert rows[1]["command"] == "python -m smolvlm_exp r=2"
    fastest = read_results(tmp_path, "train.seconds").best
    assert fastest is not None
    assert fastest.number == 0, "less is better"
    assert read_results(tmp_path, None).metric == METRIC


def test_a_sweep_that_was_resumed_on_other_rows_says_so(tmp_path):
    summary = {
        "status": "done",
        "after": {"preference_accuracy": 0.5},
        "held_out_rows": 8,
        "train": {"seconds": 1, "memory_peak_gib": 1},
    }
    jobs = {(f"{key}=1",): {**summary, "data_digest": key} for key in ("adapter.r", "trainer.beta")}
    sweep = made(tmp_path, jobs)
    said = "the training rows changed between these runs, so settings do not explain them; 8 held-out rows: too few"
    assert said in sweep.verdict
    assert said in write_page(sweep).read_text()
    assert "changed" not in replace(sweep, keys=["data.train"]).verdict


def test_a_sweep_of_equals_is_a_tie_that_time_and_then_memory_decide(tmp_path):
    results = {("r=1",): (0.9, 30, 2.0), ("r=2",): (0.9, 20, 3.0), ("r=3",): (0.9, 20, 2.0), ("r=4",): (0.7, 10, 1.0)}
    sweep = made(tmp_path, results)
    assert [row["best"] for row in results_table(sweep)] == [False, False, True, False]
    assert [row["tied"] for row in results_table(sweep)] == [True, True, False, False]
    assert sweep.verdict == "a tie: job 2 cannot be told from 0, 1; of equals the fastest counts as the best"
    assert "best with r=3. A tie: job 2" in write_page(sweep).read_text()


@pytest.mark.parametrize(
    ("rows", "said"), [(200, "a tie: job 1 cannot be told from 0 on 200 held"), (8, "8 held-out ro")]
)
def test_within_the_noise_is_a_tie_and_few_rows_say_nothing(tmp_path, rows, said):
    right = {"0": np.arange(rows) % 2 < 1, "1": np.arange(rows) % 2 < 1, "2": np.zeros(rows, bool)}
    right["1"][1] = True  # one more of them
    changes = {"preference_accuracy": {"low": -0.01, "high": 0.02}}
    done = {"status": "done", "held_out_rows": rows, "changes": changes, "train": {"seconds": 1, "memory_peak_gib": 1}}
    value = {job: {"preference_accuracy": float(own.mean())} for job, own in right.items()}
    made(tmp_path, {(f"r={job}",): {**done, "after": after} for job, after in value.items()})
    for job, own in right.items():
        prints = [number.to_bytes(8) for number in range(rows)]
        save_per_row(tmp_path / job, {"train": [], "test": prints}, {"preference_accuracy": mean(own.tolist())})
    sweep = read_results(tmp_path, METRIC)
    assert [job.number for job in sweep.tied] == [0]
    assert said in sweep.verdict
    assert ("no gain over before" in sweep.verdict) == (rows == 200)
    page = write_page(sweep).read_text()
    assert said in page
    assert '<td data-name="Notes">tie' in page


def test_without_pairs_jobs_are_compared_by_reward(tmp_path):
    rewards = {("r=1",): 1.5, ("r=2",): 2.5, ("r=3",): -1.0}
    measured = {job: {"reward": reward, "recall": 0.5} for job, reward in rewards.items()}
    made(tmp_path, {job: {"status": "done", "after": after} for job, after in measured.items()})
    results = read_results(tmp_path, None)
    assert (results.metric, results.best.number) == ("after.reward", 1)
    assert "Reward: \u22121 to 2.5; best with r=2." in write_page(results).read_text()
    assert read_results(tmp_path, "after.recall").metric == "after.recall"


def test_the_page_escapes_text_and_needs_no_finished_job(tmp_path):
    results = grid({("4", "1e-4", "0"): 0.5, ("8", "1e-4", "0"): 0.6})
    failed = {("adapter.r=<b>", "trainer.learning_rate=1e-4", "seed=0"): {"status": "failed", "reason": "a <i>"}}
    text = write_page(made(tmp_path, results | failed)).read_text()
    assert "a &lt;i&gt;" in text
    assert "<i>" not in text
    assert "60.0" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "No job has finished." in write_page(made(empty, {("r=1",): {"status": "failed"}})).read_text()


@pytest.mark.parametrize(("keep", "left"), [("all", [2, 2, 1]), ("last", [1, 1, 1]), ("best", [0, 1, 1])])
def test_keep_checkpoints_decides_what_is_pruned(tmp_path, keep, left):
    results = made(tmp_path, {("r=1",): (0.8, 1, 1), ("r=2",): (0.9, 1, 1), ("r=3",): {"status": "stopped"}})
    for job, steps in (("0", (2, 10)), ("1", (2, 10)), ("2", (2,))):
        for step in steps:
            checkpoint = tmp_path / job / "checkpoints" / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "manifest.json").write_text("{}")
    prune_checkpoints(results, keep)
    assert [len(list((tmp_path / job / "checkpoints").iterdir())) for job in "012"] == left
    assert can_resume(tmp_path / "2")
    if keep == "last":
        assert (tmp_path / "0" / "checkpoints" / "checkpoint-10").is_dir()


def test_a_job_s_state_is_read_from_its_files(tmp_path):
    assert job_state(tmp_path) == "missing"
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    assert job_state(tmp_path) == "missing", "the checkpoint was never finished"
    (checkpoint / "manifest.json").write_text("{}")
    assert job_state(tmp_path) == "cut"
    (tmp_path / "summary.json").write_text('{"status": "fai')
    assert job_state(tmp_path) == "cut"
    full = f"RunError: no space left in {tmp_path}"
    for code, reason, again in ((1, "KeyError: 'a'", False), (-9, "killed by SIGKILL", True), (1, full, True)):
        (tmp_path / "summary.json").write_text(json.dumps({"status": "failed", "exit_code": code, "reason": reason}))
        assert job_state(tmp_path) == "failed"
        assert can_resume(tmp_path) is again, "one that raised restarts, a killed one or one on a full disk resumes"


def test_labels_have_only_the_settings_that_differ():
    settings = [("tracker=none", "adapter.r=4", "trainer.a.r=1"), ("tracker=none", "adapter.r=8", "keep=all")]
    assert differing_settings([Job(0, overrides) for overrides in settings]) == {"adapter.r": ["4", "8"]}
    assert short_keys(["adapter.r", "a.lr"]) == {"adapter.r": "r", "a.lr": "lr"}
    assert short_keys(["a.r", "b.r"]) == {"a.r": "a.r", "b.r": "b.r"}
    assert job_label(Job(0, ("adapter.r=4", "x.lr=0.00123456789")), ["adapter.r", "x.lr"]) == "r=4 lr=0.001235"


def test_a_folder_with_another_sweep_s_jobs_is_refused(tmp_path):
    write_jobs(tmp_path, [Job(0, ("adapter.r=4",)), Job(1, ("adapter.r=8",))], ["adapter.r"])
    check_same_jobs(tmp_path, [Job(0, ("adapter.r=8", "keep=all")), Job(1, ("adapter.r=4",))])
    with pytest.raises(RequestError, match=r"adapter\.r is 4, 16 here and 4, 8 there"):
        check_same_jobs(tmp_path, [Job(0, ("adapter.r=4",)), Job(1, ("adapter.r=16",))])


def test_the_time_is_estimated_from_earlier_runs(tmp_path, monkeypatch):
    """100 s in all, of which 60 s of training on 80 x 16 pairs; half the steps then take 70 s."""
    monkeypatch.setattr("smolvlm_exp.runs.find.OUTPUTS", tmp_path)
    half = compose("trainer.max_steps=40")
    sweep = tmp_path / "sweeps" / "a" / "b"
    assert estimate_time(sweep, [half]) is None
    run = tmp_path / "a" / "b"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").write_text(yaml.dump(asdict(compose())))
    train = {"seconds": 60.0, "pairs_per_second": 80 * 16 / 60}
    (run / "summary.json").write_text(json.dumps({"status": "done", "seconds": 100.0, "train": train}))
    estimate = estimate_time(sweep, [half, half])
    assert estimate is not None
    assert estimate[0] == pytest.approx(140)
    assert "latest run of this model and data" in estimate[1]
    assert estimate_time(sweep, [compose("data.train_rows=64")]) is None, "other data, nothing known"


def test_two_jobs_never_share_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert visible_gpus() == ["4", "7"]
    code = (
        "import os, time; from smolvlm_exp.sweep.devices import assign_device\n"
        "with assign_device(2): print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)"
    )

    def holder() -> subprocess.Popen:
        process = jobs.enter_context(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
        jobs.callback(process.kill)
        return process

    with ExitStack() as jobs:
        other = holder()
        assert other.stdout.readline().strip() == "4"
        with free_gpu(visible_gpus()) as mine:
            assert mine == "7"
            third = holder()
            time.sleep(1)
            other.kill()  # the GPU of a job that dies is free
            assert third.stdout.readline().strip() == "4"
