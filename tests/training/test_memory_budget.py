"""trainer.memory_budget in whole runs: other micro-batches, the same training."""

import pytest
import torch

from smolvlm_exp.engine.memory import planner as memory
from smolvlm_exp.engine.memory import probe
from smolvlm_exp.tasks.train import train
from smolvlm_exp.training import memory_budget as fit
from smolvlm_exp.training.memory_budget import memory_cap
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import SIGMOID, losses

pytestmark = pytest.mark.usefixtures("unseen")


STEP = ("trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2", "trainer.eval_strategy=no")


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_planned_run_trains_as_an_unplanned_one(quick, tmp_path, capsys, checkpointing):
    asked = (*SIGMOID, *STEP, f"trainer.gradient_checkpointing={checkpointing}", f"trainer.cache={tmp_path / 'cache'}")
    for name, budget in (("plain", "none"), ("planned", "27MiB" if checkpointing else "40MiB")):
        (tmp_path / name).mkdir()
        train(quick(f"trainer.memory_budget={budget}", *asked), tmp_path / name)
        told = capsys.readouterr().out
        assert ("memory plan:" in told) == (budget != "none")
    assert "micro-batch 2 x 4 accumulation" in told
    assert f"activation checkpointing: {'full' if checkpointing else 'none'}" in told
    assert losses(tmp_path / "planned") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


@pytest.mark.parametrize("checkpointing", ["full", "none"])
def test_fused_layers_are_not_checkpointed_once_more(quick, tmp_path, monkeypatch, checkpointing):
    built = []
    monkeypatch.setattr(fit, "plan_memory", lambda config, trainer: built.append(trainer))
    train(quick(*SIGMOID, "trainer.max_steps=1", f"trainer.gradient_checkpointing={checkpointing == 'full'}"), tmp_path)
    layers = built[0].model.get_base_model().base_model.text_model.layers
    assert [layer.forward.checkpointing for layer in layers] == [checkpointing] * len(layers)
    assert not any(layer.gradient_checkpointing for layer in layers)


def test_a_probed_run_trains_as_an_unplanned_one(quick, tmp_path, capsys, monkeypatch):
    """The way a GPU goes, on a CPU: what is free, its speed and the peaks are made up, the passes are real."""
    predicted, passes, proposals = {}, [], memory.proposals

    def proposed(*args):
        found = proposals(*args)
        predicted.update({(plan.micro_batch, plan.checkpointing): plan for plan in found})
        return found

    def measured(run, plan):
        run(plan)
        passes.append((plan.micro_batch, plan.checkpointing))
        formula = predicted[passes[-1]]
        return formula.resident, formula.resident + 1.2 * formula.activations

    asked = (*SIGMOID, *STEP, f"trainer.cache={tmp_path / 'cache'}")
    for name, budget in (("plain", "none"), ("probed", "auto")):
        (tmp_path / name).mkdir()
        if budget == "auto":
            monkeypatch.setattr(fit, "on_gpu", lambda trainer: True)
            monkeypatch.setattr(probe, "available_memory", lambda: 88 * 2**20)
            monkeypatch.setattr(probe, "measure_card", lambda dtype: memory.CPU)
            monkeypatch.setattr(probe, "measure", measured)
            monkeypatch.setattr(memory, "proposals", proposed)
        train(quick(f"trainer.memory_budget={budget}", *asked), tmp_path / name)
    assert len(passes) == 2
    told = capsys.readouterr().out
    assert f"micro-batch {passes[1][0]} x" in told
    assert f"checkpointing: {passes[1][1]}" in told
    assert "measured" in told
    assert losses(tmp_path / "probed") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


def test_on_a_cpu_auto_leaves_sizes_alone(quick, tmp_path, capsys):
    train(quick(*SIGMOID, *STEP, "trainer.max_steps=1"), tmp_path)
    assert "memory plan:" not in capsys.readouterr().out


def test_supervised_rows_are_planned_without_rejected_answers(quick, tmp_path, capsys):
    train(quick("trainer=sft", *STEP, "trainer.max_steps=1", "trainer.memory_budget=1GiB"), tmp_path)
    assert "micro-batch 8 x 1 accumulation" in capsys.readouterr().out


def test_a_loss_that_cannot_be_parted_keeps_its_batch(quick, tmp_path, capsys):
    loss = ("trainer.loss_type=[aot]", "trainer.loss_weights=null")
    train(quick(*loss, *STEP, "trainer.max_steps=1", "trainer.memory_budget=60MiB"), tmp_path)
    assert "micro-batch 4 x 2 accumulation" in capsys.readouterr().out
    with pytest.raises(RequestError, match="micro-batch 4 with full"):
        train(quick(*loss, *STEP, "trainer.max_steps=1", "trainer.memory_budget=27MiB"), tmp_path)


def test_too_small_a_budget_is_refused_with_what_helps(quick, tmp_path):
    with pytest.raises(RequestError, match=r"memory_budget=9MiB: micro-batch 1 with full.*\n.*adapter\.target=text"):
        train(quick(*SIGMOID, *STEP, "trainer.memory_budget=9MiB"), tmp_path)


def test_a_wrong_budget_is_refused_before_anything_is_loaded(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("smolvlm_exp.training.engine_setup.load_model", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(RequestError, match=r"trainer\.memory_budget=lots is not a size"):
        train(quick("trainer.memory_budget=lots"), tmp_path)


def test_a_given_budget_caps_the_process_and_the_cap_goes_again(monkeypatch):
    fractions = [1.0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 16 * 2**30}))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: fractions[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with memory_cap("8GiB"):
        assert fractions[-1] == 0.5
    with memory_cap("auto"), memory_cap("99GiB"):
        assert fractions[-1] == 1.0
    assert fractions[-1] == 1.0
