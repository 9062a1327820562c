"""A probe puts the planner's formulas right, and leaves no trace."""

import pytest
import torch
from torch import nn

from smolvlm_exp.engine.memory import probe as probe_module
from smolvlm_exp.engine.memory.footprint import peak, resident
from smolvlm_exp.engine.memory.planner import MARGIN, DoesNotFit, Plan, fits_budget, proposals
from smolvlm_exp.engine.memory.probe import probe
from smolvlm_exp.utils.units import GIB
from tests.engine.memory.test_planner import H100, LONG, facts

RECIPE = facts("recipe")
FOUND = proposals(RECIPE, LONG, 32, H100)


class Truth:
    """A device on which activations are `off` times what the formulas say, and all that stays is `more` bytes more."""

    def __init__(self, monkeypatch, off, budget, more=0):
        self.off, self.budget, self.more, self.runs = off, budget, more, []
        monkeypatch.setattr(probe_module, "measure", self.measure)

    def measure(self, run, chosen):
        run(chosen)
        self.runs.append(chosen)
        most = self.true(chosen)
        return (self.resting, most) if most <= self.budget else (float("inf"), float("inf"))

    @property
    def resting(self):
        return resident(RECIPE) + self.more

    def true(self, chosen):
        keeps = chosen.checkpointing, chosen.vision_checkpointing
        return self.resting + round(self.off * peak(RECIPE, LONG.longest(chosen.micro_batch), *keeps))


@pytest.mark.parametrize("more", [-0.5, 0.0, 0.7])
@pytest.mark.parametrize("off", [0.6, 0.95, 1.0, 1.05, 1.3, 2.5])
@pytest.mark.parametrize("budget", [8, 16, 60])
def test_a_probe_finds_what_really_fits(monkeypatch, off, budget, more):
    device = Truth(monkeypatch, off, budget * GIB, int(more * GIB))
    found = probe(FOUND, lambda _: None, budget * GIB, [])
    assert found.measured == pytest.approx(device.true(found), rel=1e-6)
    assert found.measured <= (1 - MARGIN) * budget * GIB
    assert found.micro_batch * found.accumulation == 32
    assert found.seconds <= 1.02 * min(each.seconds for each in FOUND if fits_budget(device.true(each), budget * GIB))
    assert len(device.runs) <= probe_module.TRIES


def test_a_right_prediction_is_run_once(monkeypatch):
    device = Truth(monkeypatch, 1.0, 8 * GIB)
    probe(FOUND, lambda _: None, 8 * GIB, [])
    assert len(device.runs) == 1


def test_a_probe_refuses_what_it_could_not_run(monkeypatch):
    Truth(monkeypatch, 30.0, 8 * GIB)
    with pytest.raises(DoesNotFit):
        probe(FOUND, lambda _: None, 8 * GIB, [])


def test_a_refusal_of_the_formulas_is_tried_out(monkeypatch):
    """2.5 GiB is too little by the formulas; on this device it is not."""
    Truth(monkeypatch, 0.2, int(2.5 * GIB))
    assert probe(FOUND, lambda _: None, int(2.5 * GIB), []).measured <= 2.5 * GIB


def test_the_optimiser_to_come_is_counted(monkeypatch):
    device = Truth(monkeypatch, 1.0, 8 * GIB)
    found = probe(FOUND, lambda _: None, 8 * GIB, [], later=GIB)
    assert found.measured == device.true(found) + GIB <= (1 - MARGIN) * 8 * GIB


def test_processes_follow_the_one_with_least_room(monkeypatch):
    Truth(monkeypatch, 1.0, 16 * GIB)
    agreed = probe(FOUND, lambda _: None, 16 * GIB, [], agree=lambda size: size + 4 * GIB)
    assert agreed.measured <= (1 - MARGIN) * 16 * GIB
    assert agreed.seconds > probe(FOUND, lambda _: None, 16 * GIB, []).seconds


def test_a_probe_leaves_gradients_and_random_numbers_alone(monkeypatch):
    layer = nn.Linear(4, 4)
    before = torch.randn(4, 4)
    layer.weight.grad = before
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    def run(_):
        assert layer.weight.grad is None or layer.weight.grad is not before
        layer(torch.rand(3, 4)).sum().backward()

    Truth(monkeypatch, 1.0, 8 * GIB)
    probe(FOUND, run, 8 * GIB, list(layer.parameters()))
    assert layer.weight.grad is before
    assert layer.bias.grad is None
    assert torch.equal(torch.rand(2), expected)


def test_out_of_memory_in_a_probe_is_an_answer_and_other_errors_are_not(monkeypatch):
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    least = Plan(1, 1, "full", "full", 0, 0, 0.0)

    def fails(error):
        def run(_):
            raise error

        return run

    nothing = (float("inf"), float("inf"))
    assert probe_module.measure(lambda _: None, least) == (5, 7)
    assert probe_module.measure(fails(torch.OutOfMemoryError("no")), least) == nothing
    assert probe_module.measure(fails(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")), least) == nothing
    with pytest.raises(RuntimeError, match="shapes"):
        probe_module.measure(fails(RuntimeError("shapes do not match")), least)
