"""task=evaluate: a run, an adapter, a base, other data."""

import contextlib
import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import smolvlm_exp
from smolvlm_exp.engine.generation.sampler import SamplingPlan
from smolvlm_exp.evaluation import generate as speed
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.formatting import number

QUICK = (
    "tracker=none", "data.train_rows=32", "data.test_rows=12", "trainer.max_steps=3", "trainer.warmup_steps=0",
    "trainer.learning_rate=3e-3", "trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=8",
    "trainer.save_strategy=no",
)  # fmt: skip
SAME = ("preference_accuracy", "reward_accuracy", "preference_margin", "chair_s", "recall", "wrong_image_drop")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, in the outputs/ of an empty folder."""
    with contextlib.chdir(tmp_path_factory.mktemp("evaluate")):
        return smolvlm_exp.train(QUICK)


@pytest.fixture
def folder(run, monkeypatch):
    """Where `run` was started, as the working folder."""
    monkeypatch.chdir(run.folder.parents[2])
    return run.folder.parents[2]


def test_a_run_is_evaluated_as_it_evaluated_itself(run, folder, capsys, monkeypatch, bars):
    monkeypatch.setattr(speed, "TIMED_TOKENS", 16)
    found = smolvlm_exp.evaluate(
        ["run=last", "task.batch_sizes=[4,1,12]", "tracker=wandb", "hydra.run.dir=again"]
    ).summary
    rows, batches, sizes = (12, 12), (2, 2), (3, 3)
    assert bars.items() >= {
        "log-probs of the answers": batches, "log-probs with other images": batches, "other images": (15, 15),
        "answers": rows, "speed of answers": sizes,
    }.items()  # fmt: skip
    for part in ("before", "after"):
        for name in set(SAME) & set(run.summary[part]):
            assert found[part][name] == pytest.approx(run.summary[part][name], abs=1e-5), (part, name)
    assert found["changes"].keys() == run.summary["changes"].keys()
    assert {check["verdict"] for check in found["checks"]} == {"ok"}
    out = capsys.readouterr().out
    for name in ("base", "tuned"):
        assert [at["batch_size"] for at in found["speed"][name]] == [1, 4, 12]
        assert all(at["first_token"] > 0 and at["tokens_per_second"] > 0 for at in found["speed"][name])
        assert f"{name}: batch size 12: first token after" in out
    (table,) = folder.glob("again/wandb/offline-run-*/files/media/table/checks*.table.json")
    logged = json.loads(table.read_text())
    assert [dict(zip(logged["columns"], row, strict=True)) for row in logged["data"]] == found["checks"]
    assert (folder / "again" / "answers.jsonl").read_text() == (run.folder / "answers.jsonl").read_text()
    page = (folder / "again" / "report.html").read_text()
    assert page.count('<th scope="row">tuned</th>') == 3
    assert number(found["speed"]["tuned"][2]["tokens_per_second"]) in page


@pytest.mark.slow
def test_other_data_and_the_base_alone(run, folder):
    found = smolvlm_exp.evaluate([f"run={run.folder}", "data=photos", "hydra.run.dir=photos"]).summary
    assert "chair_s" not in found["after"]  # no truth is known
    assert 0 <= found["after"]["preference_accuracy"] <= 1
    base = smolvlm_exp.evaluate([*QUICK, "task.temperature=1.0", "hydra.run.dir=base"]).summary
    assert base["after"] == {}
    assert base["before"]["preference_accuracy"] == pytest.approx(run.summary["before"]["preference_accuracy"])
    low, high = base["intervals"]["before"]["preference_accuracy"]
    assert low <= base["before"]["preference_accuracy"] <= high


@pytest.mark.slow
def test_an_adapter_folder_and_a_merged_model_give_the_runs_numbers(command, run, folder):
    merged = run.folder / "export" / "merged"
    done = command("task=export", f"run={run.folder}", "export.format=merged", cwd=folder)
    assert (done.returncode, merged.is_dir()) == (0, True), done.stderr
    models = {
        "after": [f"model.adapter={run.folder}/adapter"],
        "before": [f"model.id={merged}", "model.weights=pretrained", "quant=none"],
    }
    for part, model in models.items():
        found = smolvlm_exp.evaluate([*QUICK, *model, f"hydra.run.dir={part}"]).summary
        assert bool(found["after"]) == (part == "after")
        for key in ("preference_accuracy", "chair_s", "chair_i", "recall", "yes_no_f1", "wrong_image_drop"):
            assert found[part][key] == pytest.approx(run.summary["after"][key], abs=1e-4), (part, key)


def test_run_without_a_task_is_refused():
    with pytest.raises(RequestError, match="run=last is for other tasks: add task=evaluate"):
        smolvlm_exp.train(["run=last"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run=last", "no run under outputs/ has finished yet"),
        ("run=nowhere", "run=nowhere: not a run folder"),
        ("task.batch_sizes=[0,4]", r"task\.batch_sizes=\[0, 4\]: 1 is the least"),
        ("model.adapter=nowhere", r"model\.adapter=nowhere: there is no adapter_config\.json"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path, monkeypatch, setting, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=message):
        smolvlm_exp.evaluate([setting, "tracker=none"])


def test_speed_as_computed_by_hand(monkeypatch):
    """Two answers, 0.5 s to the first token, 0.1 s a token: 2 x 31 tokens in 3.1 s; a slow first run does not count."""
    clock, runs = [0.0], []

    class Batch:
        def __init__(self, decoder, groups, answers, longest, sampling, end):
            assert (groups, longest, sampling.max_new_tokens, sampling.min_new_tokens) == (2, 5, 32, 32)

        def read(self, groups, embeddings, lengths, seeds):
            runs.append(groups)
            clock[0], self.tokens = clock[0] + 0.25 + 7 * (len(runs) < 3), 1

        def advance(self, steps):
            clock[0], self.tokens = clock[0] + 0.1, self.tokens + 1

        def ended_groups(self):
            return [self.tokens == 32] * 2

    plan = SamplingPlan(merge=False, rows=2, prefill_tokens=9)  # one prompt after the other, and never three at a time
    stubs = ("Decoder", MagicMock()), ("plan_for", lambda *_: plan), ("SamplingBatch", Batch)
    for name, stub in (*stubs, ("embed", lambda decoder, prompts, image: (None, [5] * len(prompts)))):
        monkeypatch.setattr(speed, name, stub)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    prompts = [SimpleNamespace(ids=[0] * 5)] * 3
    found = speed.batch_speed(SimpleNamespace(device=torch.device("cpu")), MagicMock(), prompts)
    assert found == speed.Speed(2, pytest.approx(0.5), pytest.approx(2 * 31 / 3.1), None)
    assert runs == [[0], [1]] * 3
