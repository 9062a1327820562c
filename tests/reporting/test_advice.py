"""No sign, no advice; each sign with its figures and the setting to change."""

import json

import pytest
import torch

from smolvlm_exp.reporting.advice import OLD_NAMES, advise
from smolvlm_exp.tasks.train import train
from tests.conftest import compose


def config(**trainer):
    return {
        "trainer": {
            "learning_rate": 1e-4, "memory_budget": "auto", "engine": "shared", "dataloader_num_workers": 0,
            "cache_ram": "4GiB", "beta": 0.1, "loss_type": ["sigmoid"], **trainer,
        },
        "quant": {"load_in_4bit": True}, "adapter": {"target": "text"}, "data": {"max_edge": 512},
    }  # fmt: skip


def course(**keys):
    """Twelve logged events, each key a function of its number or a constant."""
    good = {"loss": lambda i: 0.7 - 0.02 * i, "grad_norm": 1.0, "data_wait": 0.01,
            "rewards/accuracies": lambda i: 0.5 + 0.04 * i, "rewards/margins": lambda i: 0.1 * i}  # fmt: skip
    return [
        {"step": 10 * i + 10, **{k: v(i) if callable(v) else v for k, v in {**good, **keys}.items()}} for i in range(12)
    ]


def test_a_good_run_gets_none():
    summary = {"train": {"out_of_memory": 0}, "checks": [{"id": "x", "name": "X", "verdict": "ok", "value": 1}]}
    assert advise(summary, config(), course()) == []


@pytest.mark.parametrize(
    ("summary", "trainer", "events", "words"),
    [
        ({"train": {"out_of_memory": 2}}, {}, course(),
         ["Out of memory 2 times;", "memory_budget=auto left too little"]),
        ({"reason": "OutOfMemoryError: CUDA out of memory"}, {"engine": "stock"}, [],
         ["Try, in this order: ", "trainer.engine=shared, trainer.gradient_checkpointing=true, data.max_edge=256"]),
        ({}, {}, course(loss=lambda i: float("nan") if i > 3 else 0.7),
         ["gradient at step 50, 60, 70", "rate=2.5e-05"]),
        ({}, {}, course(grad_norm=lambda i: 40.0 if i == 7 else 2.0),
         ["reached 40 at step 80 (median 2)", "max_grad_norm=4,", "learning_rate=5e-05"]),
        ({}, {"learning_rate": 0.03}, course(loss=lambda i: (1.1, 1.4, 2.5, 2.7, 3.0, 2.4)[min(i, 5)]),
         ["the loss was 1.1 at first and rose to 2.5 and more around step 40", "learning_rate=0.0075,"]),
        ({}, {"learning_rate": 1e-6}, course(**{"rewards/accuracies": 0.52, "rewards/margins": 0.01}),
         ["after 120 steps at learning rate 1e-06", "pairs is 52% and the margin 0.01", "learning_rate=1e-05"]),
        # A step the right way, however small, wins most pairs: it is the margin that tells.
        ({}, {"learning_rate": 1e-6}, course(**{"rewards/accuracies": 0.92, "rewards/margins": 6e-4}),
         ["training pairs is 92% and the margin 0.0006", "learning_rate=1e-05"]),
        ({}, {}, course(data_wait=lambda i: 0.9 if i == 0 else 0.4), ["waited for batches 40%", "num_workers=4"]),
        ({}, {}, course(eval_loss=lambda i: 0.6 - 0.02 * i if i < 5 else 0.5 + 0.02 * i),
         ["lowest at step 50 (0.52) and ended at 0.72", "max_steps=50"]),
        ({"checks": [{"id": "likelihood_displacement", "name": "Drop", "verdict": "warn", "value": 0.4}]}, {},
         course(), ["likelihood displacement: chosen answers lost 0.4 nats/token",
         "loss_type=[sigmoid,sft] trainer.loss_weights=[1,1], or trainer.beta=0.3"]),
        ({"checks": [{"id": "image_reliance", "name": "Share", "verdict": "warn", "value": 0.31}]}, {},
         course(), ["relies on the image 31% as much as the base"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value and isinstance(value[0], str) else "",
)  # fmt: skip
def test_each_sign_is_told_with_its_figures(summary, trainer, events, words):
    (told,) = advise(summary, config(**trainer), events)
    sign, change = told.split("\n")
    assert all(word in told for word in words), told
    assert (sign[-1], change[-1]) == (".", ".")


def test_one_bad_batch_is_not_unstable():
    assert advise({}, config(), course(loss=lambda i: 2.0 if i == 6 else 0.6)) == []


def test_what_broke_is_not_told_to_go_faster():
    worse = {"rewards/accuracies": 0.2, "rewards/margins": -0.8}
    assert advise({}, config(), course(**worse)) == []  # the checks speak of it: answers fell
    (told,) = advise({}, config(), course(**worse, grad_norm=lambda i: 300.0 if i == 1 else 0.3))
    assert told.startswith("unstable")


def test_a_run_that_runs_out_of_memory_says_what_helps(quick, tmp_path, monkeypatch, capsys):
    from smolvlm_exp.tasks import train as pipeline

    def out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(pipeline, "evaluate", out)
    with pytest.raises(torch.OutOfMemoryError):
        train(quick(), tmp_path)
    assert "Out of memory.\nTry, in this order: data.max_edge=256" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["advice"]


def test_the_doctor_looks_at_a_run(command, tmp_path):
    folder = tmp_path / "outputs" / "a" / "b"
    (folder / ".hydra").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"status": "done", "train": {"out_of_memory": 1}}))
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in course()))
    done = command("task=doctor", "run=last")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Out of memory once; ")
    done = command("task=doctor", "run=nowhere")
    assert (done.returncode, "no run has ended there" in done.stderr) == (2, True)
    assert compose().task.name == "train"


@pytest.mark.parametrize("id", OLD_NAMES)
def test_a_summary_from_before_checks_had_ids(id):
    """Only the ways to name a check differ: the advice is the same."""
    old, new = ({"checks": [{**key, "verdict": "warn", "value": 0.4}]} for key in (
        {"name": OLD_NAMES[id]}, {"id": id, "name": "Label"}))  # fmt: skip
    assert advise(old, config(), course()) == advise(new, config(), course()) != []
