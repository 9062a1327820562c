"""A long run on a CPU is announced with what takes less; the count of its operations is PyTorch's own."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from smolvlm_exp.data.preferences import load_preferences
from smolvlm_exp.engine.forward import image_features
from smolvlm_exp.engine.memory import roofline
from smolvlm_exp.engine.memory.footprint import RowSizes
from smolvlm_exp.engine.memory.roofline import CPU, PRODUCTS
from smolvlm_exp.engine.model_parts import core_of
from smolvlm_exp.models.model import load_processor
from smolvlm_exp.models.shape import model_config
from smolvlm_exp.tasks import cpu_time
from smolvlm_exp.tasks.train import train
from smolvlm_exp.tasks.workload import image_seconds, spec_of_config
from tests.conftest import compose

REAL = ("model=smolvlm_256m", "model.weights=random", "quant=none", "data.train_rows=8", "data.test_rows=4")
ATTENTION = (PRODUCTS, PRODUCTS)
ONE = replace(  # a second per operation
    CPU, matmul=1 / PRODUCTS, bandwidth=float("inf"), text_attention=ATTENTION, vision_attention=ATTENTION
)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_real_shape_is_announced_on_a_cpu(device, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu_time, "measure_matmul", lambda dtype: 5e10)
    config = compose(*REAL, "trainer.max_steps=2")
    processor = load_processor(config.model)
    rows = load_preferences(config.data, processor, tmp_path)
    shape = SimpleNamespace(device=torch.device(device), dtype=torch.float32, config=model_config(config.model.shape))
    capsys.readouterr()
    cpu_time.log_cpu_time(config, shape, rows, processor)
    said = capsys.readouterr().out
    if device == "cuda":
        assert not said
        return
    assert said.startswith("cpu: this will take about ")
    assert "min" in said.partition("training")[0]
    assert "model.longest_edge=512 (one tile per image, not 11: about " in said
    assert said.count("\n") == 1


def test_evaluation_alone_is_announced_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu_time, "measure_matmul", lambda dtype: 5e9)
    config = compose("task=evaluate", *REAL)
    processor = load_processor(config.model)
    rows = load_preferences(config.data, processor, tmp_path, splits=("test",))
    shape = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, config=model_config(config.model.shape))
    capsys.readouterr()
    cpu_time.log_cpu_time(config, shape, rows, processor)
    assert "fewer rows (data.test)" in (said := capsys.readouterr().out)
    assert "training" not in said
    sizes, spec = [np.empty((0, 4)), cpu_time.row_sizes(rows.test, processor)], spec_of_config(config)
    config.trainer.max_steps = 5  # of the run that is evaluated
    alone = cpu_time.predict(config, spec, CPU, rows, sizes).total
    config.model.adapter = "an/adapter"
    assert alone < cpu_time.predict(config, spec, CPU, rows, sizes).total <= 2 * alone


def test_a_short_run_says_and_measures_nothing(rows, model, processor, capsys, monkeypatch):
    monkeypatch.delattr(cpu_time, "measure_matmul")
    cpu_time.log_cpu_time(compose("trainer.max_steps=2"), model, rows, processor)
    assert not capsys.readouterr().out


def test_the_towers_operations_are_counted(model, monkeypatch):
    monkeypatch.setattr(roofline, "RAMP", 0)
    monkeypatch.setattr(roofline, "KERNEL", 0.0)
    spec = spec_of_config(compose("quant=none"))
    core, side = core_of(model), spec.pixels // 3
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        image_features(core, torch.zeros(5, 3, round(side**0.5), round(side**0.5)))
    rows = RowSizes([(200, 20, 10, 5)])
    assert image_seconds(spec, rows, 1, ONE) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_what_one_tile_per_image_leaves():
    sizes = np.array([[900, 20, 10, 13], [80, 20, 10, 1], [30, 5, 5, 0]])
    assert cpu_time.as_one_tile(sizes, 64).tolist() == [[132, 20, 10, 1], [80, 20, 10, 1], [30, 5, 5, 0]]


def test_more_steps_and_rows_take_longer(rows):
    sizes = [np.array([[900, 60, 50, 13]])] * 2
    spec = replace(spec_of_config(compose("model=smolvlm_256m")), features=True)
    times = [
        cpu_time.predict(compose(f"trainer.max_steps={steps}"), spec, CPU, rows, sizes) for steps in (1, 2)
    ]  # fmt: skip
    assert times[0].evaluation == times[1].evaluation
    assert times[0].training < times[1].training


def test_training_says_it_before_it_begins(quick, tmp_path, monkeypatch):
    def said(*args):
        raise InterruptedError

    monkeypatch.setattr("smolvlm_exp.tasks.train.log_cpu_time", said)
    monkeypatch.setattr("smolvlm_exp.training.dpo.build_trainer", None)
    with pytest.raises(InterruptedError):
        train(quick(), tmp_path)
