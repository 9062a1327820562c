"""What only a CUDA device can show. `pytest -m gpu` there; skipped elsewhere by the marker."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def run(folder: Path, *overrides: str) -> dict:
    command = [sys.executable, "-m", "smolvlm_exp", "tracker=none", f"hydra.run.dir={folder}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "summary.json").read_text())


REAL_SHAPE = (
    "model=smolvlm_256m", "model.weights=random", "data=photos", "trainer.max_steps=2", "trainer.eval_strategy=no",
    "trainer.gradient_accumulation_steps=2", "trainer.logging_steps=1",
)  # fmt: skip


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_a_real_shape_trains_in_bf16(tmp_path, quant):
    summary = run(tmp_path, f"quant={quant}", "adapter=dora", *REAL_SHAPE)
    verdicts = {check["name"]: check["verdict"] for check in summary["checks"]}
    assert verdicts["trainable tensors that moved"] == "ok"
    assert verdicts["frozen weights unchanged"] == "ok"
    assert summary["train"]["first_loss"] == pytest.approx(0.6931, abs=2e-2)  # stock DoRA takes its norm in bf16


def test_the_embedded_default_improves(tmp_path):
    summary = run(tmp_path)
    assert summary["after"]["chair_s"] < summary["before"]["chair_s"]
    assert summary["after"]["preference_accuracy"] > summary["before"]["preference_accuracy"]


def test_a_budget_holds_and_was_predicted(tmp_path):
    """The plan's two lines, and what the run then took."""
    command = [sys.executable, "-m", "smolvlm_exp", "tracker=none", f"hydra.run.dir={tmp_path}", *REAL_SHAPE]
    command += ["quant=nf4", "trainer.memory_budget=3GiB", "trainer.gradient_accumulation_steps=8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    pairs, passes = map(int, re.search(r"memory: (\d+) pairs at a time, (\d+) times", done.stdout).groups())
    assert pairs * passes == 8
    predicted, measured = map(float, re.search(r"predicted ([\d.]+) GiB, measured ([\d.]+) GiB", done.stdout).groups())
    assert predicted == pytest.approx(measured, rel=0.15)
    assert json.loads((tmp_path / "summary.json").read_text())["train"]["memory_peak_gib"] <= 3
    assert "out of memory" not in done.stdout
