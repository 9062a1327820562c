"""Two processes on one machine's CPU (gloo), started as people start them, give one process's losses."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import QUICK, SIGMOID
from tests.engine.test_trainers import TOKEN_MEANS, compare

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,Idefics3EncoderLayer", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip
COUNTS = (*TOKEN_MEANS, "num_tokens", "samples_per_second")


def start(processes, *module, env=None):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launch, "-m", *module], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def train(folder, processes, engine="shared", env=None, **changes):
    """What each process logged and, at the end, its micro-batch."""
    folder.mkdir()
    done = start(processes, "tests.engine.train_together", str(folder), engine, json.dumps(changes), env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("engine", ["shared", "shared_sft"])
@pytest.mark.parametrize("env", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_are_one(tmp_path, engine, env):
    """Twelve pairs a step: four at a time in one process; in each of two, six by two."""
    (one,) = train(
        tmp_path / "one", 1, engine, per_device_train_batch_size=4, gradient_accumulation_steps=3,
        per_device_eval_batch_size=10,
    )  # fmt: skip
    two, _ = train(
        tmp_path / "two", 2, engine, env, per_device_train_batch_size=2, gradient_accumulation_steps=3, micro_batch=4,
        per_device_eval_batch_size=5, ddp_backend="gloo",
    )  # fmt: skip
    # SFT's evaluation loss is a mean of the processes' means over tokens.
    without = (*COUNTS, "eval_loss") if engine == "shared_sft" else COUNTS
    compare(two["events"], one["events"], without=without, tolerance=2e-5)


def test_sharded_adapters_are_not_rounded(tmp_path):
    """accelerate would have FSDP2 turn them to bfloat16, and the policy would not start as its reference."""
    found, _ = train(
        tmp_path / "run", 2, env=FSDP, bf16=True, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        max_steps=1, ddp_backend="gloo",
    )  # fmt: skip
    assert found["events"][0]["loss"] == pytest.approx(math.log(2), abs=5e-4)


SIX_PAIRS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "micro_batch": 4,
    "ddp_backend": "gloo",
}


def test_one_that_runs_out_of_memory_goes_on_alone(tmp_path):
    """It does its share again in smaller micro-batches while the other waits, and both have the same gradients."""
    whole = train(tmp_path / "whole", 2, **SIX_PAIRS)
    failed = train(tmp_path / "failed", 2, **SIX_PAIRS, fails=1)
    assert [each["micro_batch"] for each in (*whole, *failed)] == [4, 4, 4, 1]
    compare(failed[0]["events"], whole[0]["events"], without=TOKEN_MEANS, tolerance=2e-5)


def test_sharded_weights_and_no_memory_end_the_run(tmp_path):
    """Layers are fetched by all processes together, so one cannot go on alone; none waits for it for ever."""
    (tmp_path / "run").mkdir()
    begun = time.monotonic()
    changes = json.dumps({**SIX_PAIRS, "fails": 1})
    done = start(2, "tests.engine.train_together", str(tmp_path / "run"), "shared", changes, env=FSDP)
    assert done.returncode == 1
    assert "which sharded weights cannot lower during a run" in done.stderr
    assert time.monotonic() - begun < 120


def losses(folder):
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if "loss" in event]


SETTINGS = (*QUICK, *SIGMOID, "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2")


@pytest.mark.parametrize("sharded", [False, True])
def test_the_command_in_two_processes(tmp_path, sharded):
    """One folder, what one process would have written; a checkpoint of two goes on in one."""
    module = "tests.fsdp_on_cpu" if sharded else "smolvlm_exp"
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start(1, "smolvlm_exp", *SETTINGS, "trainer.gradient_accumulation_steps=2", f"hydra.run.dir={one}")
    assert alone.returncode == 0, alone.stderr[-4000:]
    both = start(2, module, *SETTINGS, f"hydra.run.dir={two}", env=FSDP if sharded else {})
    assert both.returncode == 0, both.stderr[-4000:]
    assert both.stdout.count("parameters trained; total") == 1
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    found, wanted = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (two, one))
    assert found.keys() == wanted.keys()
    assert all((found[name] - wanted[name]).abs().max() < 2e-4 for name in wanted)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert summaries[0]["before"] == pytest.approx(summaries[1]["before"], abs=1e-5)
    assert {check["verdict"] for check in summaries[1]["checks"]} == {
        check["verdict"] for check in summaries[0]["checks"]
    }
    if sharded:
        return
    (two / "checkpoints" / "checkpoint-4").rename(tmp_path / "away")
    (two / "summary.json").unlink()
    refused = start(1, "smolvlm_exp", f"resume={two}")
    assert refused.returncode == 2
    assert "processes was 2 and is 1" in refused.stderr
    assert "trainer.gradient_accumulation_steps=2" in refused.stderr
    resumed = start(1, "smolvlm_exp", f"resume={two}", "trainer.gradient_accumulation_steps=2")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)


def test_a_sweep_is_no_launchers(tmp_path):
    refused = start(2, "smolvlm_exp", "-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert refused.returncode == 1  # the launcher's
    assert refused.stderr.count("a sweep starts its own processes") == 1
