"""What only a CUDA device can show. `pytest -m gpu` there; skipped elsewhere by the marker."""

import json
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smolvlm_exp.utils.gpu import WITHOUT
from tests.conftest import losses
from tests.reliability.test_kills import command_killed, numbers

pytestmark = pytest.mark.gpu


def launch(folder: Path, *overrides: str, start: tuple[str, str] = ("-m", "smolvlm_exp")) -> str:
    """What the command prints."""
    command = [sys.executable, *start, "tracker=none", f"hydra.run.dir={folder}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(folder: Path, *overrides: str) -> dict:
    launch(folder, *overrides)
    return json.loads((folder / "summary.json").read_text())


REAL_SHAPE = (
    "model=smolvlm_256m", "model.weights=random", "data=photos", "trainer.max_steps=3", "trainer.eval_strategy=no",
    "trainer.gradient_accumulation_steps=2", "trainer.logging_steps=1", "trainer.warmup_steps=0",
    "task.max_new_tokens=8", "trainer.sample_steps=0",  # random weights never end an answer
)  # fmt: skip
OLD = "bf16,flash,triton"  # what an older card than Ampere lacks
PATHS = pytest.mark.parametrize("without", ["", OLD])
# Its widths, fewer layers.
SHALLOW = ("model.shape.num_hidden_layers=6", "model.shape.vision_num_hidden_layers=3")


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_a_real_shape_trains_in_bf16(tmp_path, quant):
    summary = run(tmp_path, f"quant={quant}", "adapter=dora", *REAL_SHAPE, *SHALLOW)
    verdicts = {check["id"]: check["verdict"] for check in summary["checks"]}
    assert verdicts["parameters_moved"] == "ok"
    assert verdicts["base_unchanged"] == "ok"
    assert summary["train"]["first_loss"] == pytest.approx(0.6931, abs=5e-3)


def test_the_embedded_default_improves(tmp_path):
    summary = run(tmp_path)
    assert summary["after"]["chair_s"] < summary["before"]["chair_s"]
    assert summary["after"]["preference_accuracy"] > summary["before"]["preference_accuracy"]


@PATHS
def test_a_budget_holds_and_was_predicted(tmp_path, without, monkeypatch):
    """The plan's two lines, and what the run then took."""
    monkeypatch.setenv(WITHOUT, without)
    settings = ("quant=nf4", "trainer.memory_budget=3GiB", "trainer.gradient_accumulation_steps=8")
    out = launch(tmp_path, *REAL_SHAPE, *settings)
    pairs, passes = map(int, re.search(r"memory plan: micro-batch (\d+) x (\d+) accumulation", out).groups())
    assert pairs * passes == 8
    predicted, measured = map(float, re.search(r"predicted ([\d.]+) GiB, measured ([\d.]+) GiB", out).groups())
    assert predicted == pytest.approx(measured, rel=0.15)
    assert json.loads((tmp_path / "summary.json").read_text())["train"]["memory_peak_gib"] <= 3
    assert "Out of memory at micro-batch" not in out  # image features are tried in halves


@PATHS
def test_out_of_memory_is_recovered_from(tmp_path, without, monkeypatch):
    """Eight pairs at once do not fit into 3 GiB: the step is retried with half the micro-batch until it fits."""
    monkeypatch.setenv(WITHOUT, without)
    capped = (
        "import torch; torch.cuda.set_per_process_memory_fraction(3 * 2**30 / torch.cuda.mem_get_info()[1]); "
        "from smolvlm_exp.main import main; main()"
    )
    settings = (
        *REAL_SHAPE, "quant=nf4", "trainer.memory_budget=none", "trainer.gradient_checkpointing=false",
        "trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=1",
    )  # fmt: skip
    assert "Out of memory" not in launch(tmp_path / "free", *settings)
    out = launch(tmp_path / "capped", *settings, start=("-c", capped))
    assert "Out of memory at micro-batch 8: retrying this step and continuing with 4" in out
    assert losses(tmp_path / "capped") == pytest.approx(losses(tmp_path / "free"), abs=2e-2)  # bfloat16: another order


def test_an_older_card_trains_in_float16_as_a_cpu_does_in_float32(tmp_path, monkeypatch):
    """300 steps of the embedded model: its loss is scaled, every step is finite and counts."""
    monkeypatch.setenv(WITHOUT, OLD)
    settings = (
        "trainer.max_steps=300", "trainer.logging_steps=10", "trainer.eval_strategy=no", "trainer.save_strategy=no",
        "trainer.sample_steps=0",
    )  # fmt: skip
    with ThreadPoolExecutor() as both:
        half, single = both.map(lambda d: run(tmp_path / d, f"model.dtype={d}", *settings), ("auto", "float32"))
    assert (half["hardware"]["dtype"], single["hardware"]["dtype"]) == ("float16", "float32")
    assert half["train"]["not_finite"] == single["train"]["not_finite"] == []
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "float32"), abs=5e-2)
    assert half["after"]["chair_s"] == pytest.approx(single["after"]["chair_s"], abs=0.1)


def test_killed_and_resumed_in_bf16_on_nf4(tmp_path):
    """Three kill -9 with a resume after each, against two uninterrupted runs: how far is this GPU deterministic?"""
    settings = [
        "tracker=none", *REAL_SHAPE, *SHALLOW, "quant=nf4", "adapter=dora", "trainer.max_steps=8",
        "trainer.save_steps=1", "trainer.dataloader_num_workers=1", "trainer.disable_dropout=false",
        "adapter.lora_dropout=0.1", f"trainer.cache={tmp_path / 'cache'}", "trainer.memory_budget=none",
    ]  # fmt: skip
    folders = [tmp_path / name for name in ("whole", "again", "killed")]
    kills = [command_killed(f, settings, 3 * (f.name == "killed"), random.Random(1), 0.5, tmp_path) for f in folders]
    whole, again, killed = map(numbers, folders)
    assert len(kills[-1]) == 3
    assert [e["step"] for e in killed] == [e["step"] for e in whole]
    for name in ("num_tokens", "learning_rate"):
        assert [e[name] for e in killed] == [e[name] for e in whole]

    def apart(mine):
        pairs = list(zip(mine, whole, strict=True))
        return {name: max(abs(a[name] - b[name]) for a, b in pairs) for name in ("loss", "grad_norm")}

    off, noise = apart(killed), apart(again)
    print(f"killed at steps {kills[-1]}; off by {off}, where a second run left alone is off by {noise}")
    if noise["loss"] == 0 == noise["grad_norm"]:
        assert off == noise  # a card that repeats itself repeats a resumed run too
    assert off["loss"] <= max(3 * noise["loss"], 1e-2)
