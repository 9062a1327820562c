"""No sign, no advice; each sign with its figures and the setting to change."""

import json

import pytest
import torch

from smolvlm_exp.reporting.advice import OLD_NAMES, advise
from smolvlm_exp.reporting.report import draw_curves
from smolvlm_exp.runs.event_log import read_events
from smolvlm_exp.runs.sweep_record import Job
from smolvlm_exp.sweep.results import read_result
from smolvlm_exp.tasks.doctor import doctor
from smolvlm_exp.tasks.time_estimate import estimate_time
from smolvlm_exp.tasks.train import train
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import compose


def config(**trainer):
    return {
        "trainer": {
            "learning_rate": 1e-4, "memory_budget": "auto", "engine": "shared", "dataloader_num_workers": 0,
            "cache_ram": "4GiB", "beta": 0.1, "loss_type": ["sigmoid"], **trainer,
        },
        "quant": {"load_in_4bit": True}, "adapter": {"target": "text"},
        "model": {"id": "HuggingFaceTB/SmolVLM-Instruct", "longest_edge": None, "shape": {"image_size": 384}},
    }  # fmt: skip


def events(**keys):
    """Twelve logged events, each key a function of its number or a constant."""
    good = {"loss": lambda i: 0.7 - 0.02 * i, "grad_norm": 1.0, "data_wait": 0.01,
            "rewards/accuracies": lambda i: 0.5 + 0.04 * i, "rewards/margins": lambda i: 0.1 * i}  # fmt: skip
    return [
        {"step": 10 * i + 10, **{k: v(i) if callable(v) else v for k, v in {**good, **keys}.items()}} for i in range(12)
    ]


def warning(value, **check):
    return {"checks": [{"name": "Label", "verdict": "warn", "value": value, **check}]}


@pytest.mark.parametrize(
    ("summary", "trainer", "logged", "words"),
    [
        ({"train": {"out_of_memory": 2}}, {}, events(),
         ["Out of memory 2 times;", "memory_budget=auto left too little"]),
        ({"reason": "OutOfMemoryError: CUDA out of memory"}, {"engine": "stock"}, [],
         ["Try, in this order: trainer.engine=shared, ", "gradient_checkpointing=true, model.longest_edge=768"]),
        # metrics.jsonl has null for NaN
        ({}, {}, events(loss=lambda i: None if i > 3 else 0.7, grad_norm=lambda i: None if i > 3 else 1.0),
         ["gradient at step 50, 60, 70", "rate=2.5e-05"]),
        ({}, {}, events(grad_norm=lambda i: 40.0 if i == 7 else 2.0),
         ["reached 40 at step 80 (median 2)", "max_grad_norm=4,", "learning_rate=5e-05"]),
        ({}, {"learning_rate": 0.03}, events(loss=lambda i: (1.1, 1.4, 2.5, 2.7, 3.0, 2.4)[min(i, 5)]),
         ["the loss was 1.1 at first and rose to 2.5 and more around step 40", "learning_rate=0.0075,"]),
        ({}, {"learning_rate": 1e-6}, events(**{"rewards/accuracies": 0.52, "rewards/margins": 0.01}),
         ["after 120 steps at learning rate 1e-06", "pairs is 52% and the margin 0.01", "learning_rate=1e-05"]),
        # A step the right way, however small, wins most pairs: it is the margin that tells.
        ({}, {"learning_rate": 1e-6}, events(**{"rewards/accuracies": 0.92, "rewards/margins": 6e-4}),
         ["training pairs is 92% and the margin 0.0006", "learning_rate=1e-05"]),
        ({}, {}, events(data_wait=lambda i: 0.9 if i == 0 else 0.4), ["waited for batches 40%", "num_workers=4"]),
        ({}, {}, events(eval_loss=lambda i: 0.6 - 0.02 * i if i < 5 else 0.5 + 0.02 * i),
         ["lowest at step 50 (0.52) and ended at 0.72", "max_steps=50"]),
        (warning(0.4, id="likelihood_displacement"), {}, events(),
         ["likelihood displacement: chosen answers lost 0.4 nats/token",
          "loss_type=[sigmoid,sft] trainer.loss_weights=[1,1], or trainer.beta=0.3"]),
        (warning(-0.02, id="reward_image_contribution"), {}, events(),
         ["answers to blank images earn as much as those to the rows' own (+0.02)", "image_dependence=0.5"]),
        (warning(0.31, id="image_reliance"), {}, events(), ["relies on the image 31% as much as the base"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value and isinstance(value[0], str) else "",
)  # fmt: skip
def test_advice_gives_the_figures_and_a_setting_to_change(summary, trainer, logged, words):
    (advice,) = advise(summary, config(**trainer), logged)
    sign, change = advice.split("\n")
    assert all(word in advice for word in words), advice
    assert (sign[-1], change[-1]) == (".", ".")


def test_a_good_run_or_a_single_bad_batch_gets_no_advice():
    summary = {"train": {"out_of_memory": 0}, "checks": [{"id": "x", "name": "X", "verdict": "ok", "value": 1}]}
    assert advise(summary, config(), events()) == []
    assert advise({}, config(), events(loss=lambda i: 2.0 if i == 6 else 0.6)) == []


def test_no_higher_learning_rate_for_a_run_that_diverged():
    worse = {"rewards/accuracies": 0.2, "rewards/margins": -0.8}
    assert advise({}, config(), events(**worse)) == []  # likelihood displacement is what the checks report
    (advice,) = advise({}, config(), events(**worse, grad_norm=lambda i: 300.0 if i == 1 else 0.3))
    assert advice.startswith("unstable")


@pytest.mark.parametrize("id", OLD_NAMES)
def test_summaries_from_before_checks_had_ids_get_the_same_advice(id):
    old, new = warning(0.4, name=OLD_NAMES[id]), warning(0.4, id=id)
    assert advise(old, config(), events()) == advise(new, config(), events()) != []


def test_a_run_that_runs_out_of_memory_says_what_helps(quick, tmp_path, monkeypatch, capsys):
    def out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("smolvlm_exp.tasks.result.evaluate", out)
    with pytest.raises(torch.OutOfMemoryError):
        train(quick("model.id=embedded"), tmp_path)
    assert "Out of memory.\nTry, in this order: model.longest_edge=64" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["advice"]


def test_the_doctor_advises_on_a_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "a" / "b"
    (folder / ".hydra").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"status": "done", "train": {"out_of_memory": 1}}))
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events()))
    doctor(compose("task=doctor", "run=last"), tmp_path)
    assert capsys.readouterr().out.startswith("run: outputs/a/b\n\nOut of memory once; ")
    with pytest.raises(RequestError, match="no run has ended there"):
        doctor(compose("task=doctor", "run=nowhere"), tmp_path)


def test_steps_that_are_all_warmup():
    done = {"status": "done", "train": {"steps": 1}}
    (advice,) = advise(done, config(warmup_steps=0.05), [{"step": 1, "loss": 0.7, "learning_rate": 0.0}])
    assert advice == (
        "warmup: the learning rate was still rising at the last of 1 step; it was 0 at most.\n"
        "Try trainer.warmup_steps=0, or more steps (trainer.max_steps)."
    )
    constant = [{"step": 1, "loss": 0.7, "learning_rate": 1e-4}]
    assert advise(done, config(warmup_steps=0.05), constant) == []
    assert advise(done, config(warmup_steps=0), [{"step": 1, "loss": 0.7, "learning_rate": 1e-4}]) == []


DAMAGED = [
    "[1, 2]", "{", "null", '{"status": "done"}', json.dumps({"status": "done", "checks": None, "train": None}),
    json.dumps({"status": "done", "checks": [{"verdict": "warn"}, None], "train": {"steps": None}, "changes": [1]}),
    json.dumps({"status": "done", "before": {"recall": None}, "after": {"recall": None}, "seconds": None}),
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_run_is_read_as_far_as_it_goes(tmp_path, monkeypatch, capsys, text):
    """Nulls, missing keys, half lines: by task=doctor, the card of an export, a sweep's estimate and its table."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "a" / "b"
    (folder / ".hydra").mkdir(parents=True)
    (folder / "summary.json").write_text(text)
    (folder / ".hydra" / "config.yaml").write_text(json.dumps({**config(), "data": {"source": "shapes"}}))
    null = dict.fromkeys(events()[0])
    lines = [{**null, "step": 1, "reward": None}, *events()[:5], {"step": None}, *events()[5:]]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 130, "loss": 0.')
    doctor(compose("task=doctor", "run=last"), tmp_path)
    assert capsys.readouterr().out.startswith("run: outputs/a/b\n\nNaN or infinite loss or gradient at step 1:")
    assert estimate_time(tmp_path, [compose()]) is None
    assert read_result(folder.parent, Job("b", ())).value("after.recall") is None
    assert draw_curves(read_events(folder / "metrics.jsonl"))
