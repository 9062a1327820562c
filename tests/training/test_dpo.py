"""Training for real on the embedded model: what moves, what does not, and what the first loss is."""

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from smolvlm_exp.tasks.train import train
from smolvlm_exp.training import dpo
from smolvlm_exp.training.arguments import TrainerConfig, build_trl_config
from smolvlm_exp.training.dpo import LOSSES
from tests.conftest import SIGMOID, losses, read_lines


def verdicts(summary):
    return {check["id"]: check["verdict"] for check in summary["checks"]}


EVALUATED = ["adapter=dora quant=nf4", "adapter=none quant=none trainer.learning_rate=1e-4"]
TRAINED = [
    "adapter=lora quant=none",
    "adapter=dora quant=int8",
    "adapter=pissa quant=none",  # its start is taken out of the base: the reference must be a copy
    "adapter=dora adapter.target=.*connector.*",
    *(
        pytest.param(setting, marks=pytest.mark.slow)
        for setting in (
            "adapter=lora quant=int8",
            "adapter=dora adapter.target=recipe",
            "adapter=rslora quant=fp4",
            "adapter=dora adapter.target=all",
            "adapter=lora +adapter.extra.bias=lora_only quant=none",
        )
    ),
]


@pytest.mark.parametrize("setting", [*EVALUATED, *TRAINED])
def test_the_first_loss_is_ln_2_and_only_the_adapter_moves(quick, tmp_path, request, setting):
    if setting not in EVALUATED:
        request.getfixturevalue("unseen")
    summary = train(quick(*SIGMOID, *setting.split(), "task.max_new_tokens=3"), tmp_path)
    if setting in EVALUATED:
        assert 0 < summary["after"]["mean_length"] <= 3
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert "fail" not in verdicts(summary).values()
    assert summary["status"] == "done"
    assert summary["train"]["trainable_parameters"] <= summary["train"]["total_parameters"]
    saved = tmp_path / ("model" if "adapter=none" in setting else "adapter")
    assert list(saved.glob("*.safetensors"))


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("engine", ["shared", "stock"])
def test_the_parts_of_a_combined_loss_are_logged_apart(quick, tmp_path, engine):
    """Unweighted, over micro-batches too; a single loss has no parts."""
    combined = ("trainer.loss_type=[sigmoid,sft]", "trainer.loss_weights=[1.0,0.5]", "trainer.eval_strategy=steps")
    split = ("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2", "trainer.eval_steps=3")
    train(quick(*combined, *split, "quant=none", f"trainer.engine={engine}"), tmp_path)
    events = read_lines(tmp_path / "metrics.jsonl")
    steps = [event for event in events if "loss" in event]
    assert steps[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)
    for event in steps:
        assert event["loss"] == pytest.approx(event["loss/dpo"] + 0.5 * event["loss/sft"], rel=1e-5)
    (held_out,) = (event for event in events if "eval_loss" in event)
    parts = held_out["eval_loss/dpo"] + 0.5 * held_out["eval_loss/sft"]
    assert held_out["eval_loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("adapter", ["dora", "pissa"])
def test_the_saved_adapter_gives_the_tuned_models_answers(quick, tmp_path, adapter):
    """An ordinary PEFT adapter for the untouched base, PiSSA's too, also where a task is given `run`."""
    from peft import PeftModel

    from smolvlm_exp.data.preferences import load_preferences
    from smolvlm_exp.evaluation.preference import answer_logps, preference_metrics
    from smolvlm_exp.models.model import load_finetuned_model, load_model, load_processor

    config = quick(f"adapter={adapter}", "quant=none", "trainer.learning_rate=2e-3")
    summary = train(config, tmp_path)
    tuned = PeftModel.from_pretrained(load_model(config.model), tmp_path / "adapter")
    again = load_finetuned_model(replace(config.model, adapter=str(tmp_path)), config.quant, config.adapter, 0)
    assert all(map(torch.equal, again.parameters(), tuned.parameters()))
    processor = load_processor(config.model)
    rows = load_preferences(config.data, processor, tmp_path).test
    base = answer_logps(load_model(config.model), processor, rows, 8, None)
    found = preference_metrics(answer_logps(tuned, processor, rows, 8, None), base, beta=config.trainer.beta)
    assert abs(summary["after"]["preference_margin"]) > 1e-4
    assert found["preference_margin"].value == pytest.approx(summary["after"]["preference_margin"], abs=1e-5)


@pytest.mark.usefixtures("unseen")
def test_the_same_seed_gives_the_same_losses_and_another_does_not(quick, tmp_path):
    runs = {}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        dropout = ("adapter.lora_dropout=0.1", "trainer.disable_dropout=false")
        train(quick(f"seed={seed}", "trainer.max_steps=2", *dropout), tmp_path / name)
        runs[name] = losses(tmp_path / name)
    assert runs["one"] == runs["two"]
    assert runs["one"] != runs["other"]


@pytest.mark.usefixtures("unseen")
def test_dpo_overfits_a_tiny_set(quick, tmp_path):
    tiny = ("data.train_rows=4", "trainer.max_steps=20", "trainer.beta=0.3", "trainer.learning_rate=5e-3")
    train(quick(*SIGMOID, *tiny, "trainer.eval_strategy=no", "quant=none"), tmp_path)
    last = [event for event in read_lines(tmp_path / "metrics.jsonl") if "loss" in event][-1]
    assert last["rewards/accuracies"] == 1
    assert last["loss"] < 0.1


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("trainer", ["mpo", *(pytest.param(name, marks=pytest.mark.slow) for name in
                                              ("ipo", "hinge", "robust", "apo_zero"))])  # fmt: skip
def test_every_trainer_trains(quick, tmp_path, trainer):
    summary = train(quick(f"trainer={trainer}"), tmp_path)
    assert summary["train"]["steps"] == 3
    assert verdicts(summary)["parameters_moved"] == "ok"
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("loss", [LOSSES, *(pytest.param((one,), marks=pytest.mark.slow) for one in LOSSES)], ids=len)
def test_every_loss_of_trl_is_reachable(quick, tmp_path, loss):
    """All in one sum, and each by itself."""
    smooth = ["trainer.label_smoothing=0.001"] if {"exo_pair", "robust"} & set(loss) else []
    chosen = (f"trainer.loss_type=[{','.join(loss)}]", "trainer.loss_weights=null", "trainer.max_steps=1")
    summary = train(quick(*chosen, "data.train_rows=4", *smooth), tmp_path)
    assert summary["status"] == "done"
    assert math.isfinite(summary["train"]["first_loss"])


@pytest.mark.usefixtures("unseen")
def test_accumulation_and_checkpointing_change_no_loss(quick, tmp_path):
    """Four pairs in one forward pass, or one by one with their activations computed again: the same steps."""
    for batch, passes, checkpointing in ((4, 1, False), (1, 4, True)):
        folder = tmp_path / str(batch)
        folder.mkdir()
        sizes = (f"trainer.per_device_train_batch_size={batch}", f"trainer.gradient_accumulation_steps={passes}")
        train(quick(*SIGMOID, *sizes, "quant=none", f"trainer.gradient_checkpointing={checkpointing}"), folder)
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), abs=1e-5)


@pytest.mark.usefixtures("unseen")
def test_a_failed_run_has_its_reason_in_the_summary_and_its_advice_on_stderr(quick, tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(dpo, "build_trainer", broken)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        train(quick(), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("failed", "RuntimeError: CUDA out of memory")
    assert summary["advice"]
    assert capsys.readouterr().err.endswith("".join(f"{advice}\n" for advice in summary["advice"]))


@pytest.mark.usefixtures("unseen")
def test_metrics_have_memory_and_speed(quick, tmp_path):
    train(quick("trainer.eval_strategy=steps", "trainer.eval_steps=1"), tmp_path)
    events = read_lines(tmp_path / "metrics.jsonl")
    step = next(event for event in events if "loss" in event)
    assert step["pairs_per_second"] > 0
    assert step["tokens_per_second"] > step["pairs_per_second"]
    assert 0 <= step["data_wait"] < 1
    assert step["memory_peak_gib"] >= step["memory_allocated_gib"] > 0.1
    assert any("eval_loss" in event for event in events)
    assert torch.isfinite(torch.tensor([event["step"] for event in events])).all()


def test_each_process_uses_one_gpu(capsys, tmp_path):
    """Several visible GPUs would make upstream wrap the model in nn.DataParallel, which TRL refuses."""

    @dataclass(init=False)
    class Arguments:
        n_gpu = property(lambda self: self._n_gpu)
        mixed_precision = "no"
        accelerator_config = SimpleNamespace(use_seedable_sampler=True)

        def __init__(self, gpus, bf16, fp16, **others):
            self._n_gpu, self.bf16, self.fp16 = gpus, bf16, fp16

    for gpus, left in ((0, 0), (1, 1), (4, 1)):
        assert build_trl_config(Arguments, TrainerConfig(), tmp_path, "float32", None, 0, gpus=gpus).n_gpu == left
        assert ("accelerate launch --num_processes 4" in capsys.readouterr().out) == (gpus == 4)
