"""trainer.memory_budget: other micro-batches, the same training."""

from functools import partial

import pytest
import torch

from smolvlm_exp.engine.memory import planner as memory
from smolvlm_exp.engine.memory import probe
from smolvlm_exp.engine.memory.roofline import CPU
from smolvlm_exp.tasks.train import train
from smolvlm_exp.training import memory_budget
from smolvlm_exp.training.memory_budget import memory_cap
from smolvlm_exp.utils.errors import RequestError
from tests.conftest import SIGMOID, losses

pytestmark = pytest.mark.usefixtures("unseen")


@pytest.fixture
def quick(quick):
    """On the embedded model: the budgets are its own."""
    return partial(quick, "model.id=embedded")


STEP = (
    "data.train_rows=32", "data.test_rows=8", "trainer.per_device_train_batch_size=4",
    "trainer.gradient_accumulation_steps=2", "trainer.eval_strategy=no",
)  # fmt: skip


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_planned_run_trains_as_an_unplanned_one(quick, tmp_path, capsys, checkpointing):
    """On a CPU the default, auto, plans nothing."""
    settings = (*SIGMOID, *STEP, f"trainer.gradient_checkpointing={checkpointing}")
    for name, budget in (("plain", "auto"), ("planned", "24MiB" if checkpointing else "40MiB")):
        (tmp_path / name).mkdir()
        train(quick(f"trainer.memory_budget={budget}", *settings), tmp_path / name)
        out = capsys.readouterr().out
        assert ("memory plan:" in out) == (budget != "auto")
    assert "micro-batch 2 x 4 accumulation" in out
    assert f"activation checkpointing: {'full' if checkpointing else 'none'}" in out
    assert losses(tmp_path / "planned") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


@pytest.mark.parametrize("checkpointing", ["full", "none"])
def test_fused_layers_are_not_checkpointed_twice(quick, tmp_path, monkeypatch, checkpointing):
    built = []
    monkeypatch.setattr(memory_budget, "plan_memory", lambda config, trainer: built.append(trainer))
    train(quick(*SIGMOID, "trainer.max_steps=1", f"trainer.gradient_checkpointing={checkpointing == 'full'}"), tmp_path)
    layers = built[0].model.get_base_model().base_model.text_model.layers
    assert [layer.forward.checkpointing for layer in layers] == [checkpointing] * len(layers)
    assert not any(layer.gradient_checkpointing for layer in layers)


def test_a_probed_run_trains_as_an_unplanned_one(quick, tmp_path, capsys, monkeypatch):
    """The code path of a GPU: free memory, speed and peaks are made up, the passes are real."""
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

    for name, budget in (("plain", "none"), ("probed", "auto")):
        (tmp_path / name).mkdir()
        if budget == "auto":
            monkeypatch.setattr(memory_budget, "on_gpu", lambda trainer: True)
            monkeypatch.setattr(probe, "available_memory", lambda: 76 * 2**20)
            monkeypatch.setattr(probe, "measure_card", lambda dtype: CPU)
            monkeypatch.setattr(probe, "measure", measured)
            monkeypatch.setattr(memory, "proposals", proposed)
        train(quick(f"trainer.memory_budget={budget}", *SIGMOID, *STEP), tmp_path / name)
    assert len(passes) == 2
    out = capsys.readouterr().out
    assert f"micro-batch {passes[1][0]} x" in out
    assert f"checkpointing: {passes[1][1]}" in out
    assert "measured" in out
    assert losses(tmp_path / "probed") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


def test_sft_is_planned_without_rejected_answers(quick, tmp_path, capsys):
    train(quick("trainer=sft", *STEP, "trainer.max_steps=1", "trainer.memory_budget=1GiB"), tmp_path)
    assert "micro-batch 8 x 1 accumulation" in capsys.readouterr().out


def test_a_batch_loss_is_never_split(quick, tmp_path, capsys):
    loss = ("trainer.loss_type=[aot]", "trainer.loss_weights=null")
    train(quick(*loss, *STEP, "trainer.max_steps=1", "trainer.memory_budget=60MiB"), tmp_path)
    assert "micro-batch 4 x 2 accumulation" in capsys.readouterr().out
    with pytest.raises(RequestError, match="micro-batch 4 with full"):
        train(quick(*loss, *STEP, "trainer.max_steps=1", "trainer.memory_budget=27MiB"), tmp_path)


def test_too_small_a_budget_is_refused_with_advice(quick, tmp_path):
    with pytest.raises(RequestError, match=r"memory_budget=9MiB: micro-batch 1 with full.*\n.*adapter\.target=text"):
        train(quick(*SIGMOID, *STEP, "trainer.memory_budget=9MiB"), tmp_path)


def test_a_wrong_budget_is_refused_before_anything_is_loaded(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("smolvlm_exp.training.engine_setup.load_model", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(RequestError, match=r"trainer\.memory_budget=lots is not a size"):
        train(quick("trainer.memory_budget=lots"), tmp_path)


def test_a_given_budget_caps_the_process_until_the_run_ends(monkeypatch):
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
