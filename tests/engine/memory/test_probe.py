"""A probe corrects the planner's formulas, and leaves no trace."""

import pytest
import torch
from torch import nn

from smolvlm_exp.engine.memory import probe as probe_module
from smolvlm_exp.engine.memory.footprint import peak, resident
from smolvlm_exp.engine.memory.planner import MARGIN, DoesNotFit, fits_budget, proposals
from smolvlm_exp.engine.memory.probe import probe
from smolvlm_exp.utils.units import GIB
from tests.engine.memory.test_planner import H100, LONG, facts

RECIPE = facts("recipe")
PLANS = proposals(RECIPE, LONG, 32, H100)


@pytest.fixture
def probed(monkeypatch):
    """`probe` on a device whose activations are `off` times the formulas' and which holds `more` GiB all the time."""

    def run(off, budget, more=0.0, run=lambda _: None, parameters=(), **options):
        runs, resting = [], resident(RECIPE) + int(more * GIB)

        def true_peak(plan):
            levels = plan.checkpointing, plan.vision_checkpointing
            return resting + round(off * peak(RECIPE, LONG.longest(plan.micro_batch), *levels))

        def measure(run, plan):
            run(plan)
            runs.append(plan)
            most = true_peak(plan)
            return (resting, most) if most <= budget * GIB else (float("inf"), float("inf"))

        monkeypatch.setattr(probe_module, "measure", measure)
        return probe(PLANS, run, int(budget * GIB), parameters, **options), true_peak, runs

    return run


@pytest.mark.parametrize("more", [-0.5, 0.0, 0.7])
@pytest.mark.parametrize("off", [0.6, 0.95, 1.0, 1.05, 1.3, 2.5])
@pytest.mark.parametrize("budget", [8, 16, 60])
def test_a_probe_finds_the_fastest_plan_that_really_fits(probed, off, budget, more):
    found, true_peak, runs = probed(off, budget, more)
    assert found.measured == pytest.approx(true_peak(found), rel=1e-6)
    assert found.measured <= (1 - MARGIN) * budget * GIB
    assert found.micro_batch * found.accumulation == 32
    assert found.seconds <= 1.02 * min(plan.seconds for plan in PLANS if fits_budget(true_peak(plan), budget * GIB))
    assert len(runs) <= probe_module.TRIES


def test_a_correct_prediction_is_run_once(probed):
    assert len(probed(1.0, 8)[2]) == 1


def test_a_probe_refuses_what_it_could_not_run(probed):
    with pytest.raises(DoesNotFit):
        probed(30.0, 8)


def test_what_does_not_fit_by_the_formulas_is_tried(probed):
    """2.5 GiB are too little by the formulas; on this device they are not."""
    assert probed(0.2, 2.5)[0].measured <= 2.5 * GIB


def test_the_optimiser_to_come_is_counted(probed):
    found, true_peak, _ = probed(1.0, 8, later=GIB)
    assert found.measured == true_peak(found) + GIB <= (1 - MARGIN) * 8 * GIB


def test_processes_follow_the_one_with_least_room(probed):
    agreed, *_ = probed(1.0, 16, agree=lambda size: size + 4 * GIB)
    assert agreed.measured <= (1 - MARGIN) * 16 * GIB
    assert agreed.seconds > probed(1.0, 16)[0].seconds


def test_a_probe_leaves_gradients_and_random_numbers_alone(probed):
    layer, before = nn.Linear(4, 4), torch.randn(4, 4)
    layer.weight.grad = before
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    def run(_):
        assert layer.weight.grad is None or layer.weight.grad is not before
        layer(torch.rand(3, 4)).sum().backward()

    probed(1.0, 8, run=run, parameters=list(layer.parameters()))
    assert layer.weight.grad is before
    assert layer.bias.grad is None
    assert torch.equal(torch.rand(2), expected)


def test_only_out_of_memory_counts_as_not_fitting(monkeypatch):
    answers = {"empty_cache": None, "reset_peak_memory_stats": None, "memory_allocated": 5, "max_memory_allocated": 7}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)

    def measured(*errors):
        def run(_):
            for error in errors:
                raise error

        return probe_module.measure(run, PLANS[0])

    assert measured() == (5, 7)
    words = ("CUBLAS_STATUS_ALLOC_FAILED when calling", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    errors = (torch.OutOfMemoryError("no"), MemoryError(), *map(RuntimeError, words))
    with pytest.raises(RuntimeError) as of_a_cpu:
        torch.empty(2**60)
    for error in (*errors, of_a_cpu.value):
        assert measured(error) == (float("inf"), float("inf"))
    with pytest.raises(RuntimeError, match="shapes"):
        measured(RuntimeError("shapes do not match"))
