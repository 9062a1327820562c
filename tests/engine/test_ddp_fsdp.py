"""Two processes on one machine's CPU (gloo), started as people start them, give one process's losses."""

import json
import math
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import QUICK, SIGMOID, losses
from tests.engine.test_grpo_trainer import SCORED
from tests.engine.test_trainers import TOKEN_MEANS, compare, compare_weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,Idefics3EncoderLayer", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip
SIX_PAIRS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "micro_batch": 4, "ddp_backend": "gloo",
}  # fmt: skip
TIMES = ("sampling_time", "step_time")
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


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Twelve pairs per step, four at a time; the six held-out ones at once: TRL's metrics are means of batches."""
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "per_device_eval_batch_size": 6}
    return cache(lambda engine: train(tmp_path_factory.mktemp("one") / engine, 1, engine, **changes)[0]["events"])


@pytest.mark.parametrize("engine", ["shared", "shared_sft"])
@pytest.mark.parametrize("env", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_train_as_one(tmp_path, one_process, engine, env):
    """Twelve pairs per step: in each process six, two at a time."""
    two, _ = train(tmp_path / "two", 2, engine, env, **SIX_PAIRS, per_device_eval_batch_size=3)
    # SFT's evaluation loss is a mean of the processes' means over tokens.
    without = (*COUNTS, "eval_loss") if engine == "shared_sft" else COUNTS
    compare(two["events"], one_process(engine), without, tolerance=2e-5)


def test_sharded_adapters_are_not_rounded(tmp_path):
    """accelerate would have FSDP2 turn them to bfloat16, and the policy would not start as its reference."""
    logged, _ = train(tmp_path / "run", 2, env=FSDP, **SIX_PAIRS, bf16=True, max_steps=1)
    assert logged["events"][0]["loss"] == pytest.approx(math.log(2), abs=5e-4)


def test_a_process_that_runs_out_of_memory_retries_alone(tmp_path):
    """It does its share again in smaller micro-batches while the other waits, and both have the same gradients."""
    undisturbed = train(tmp_path / "undisturbed", 2, **SIX_PAIRS)
    failed = train(tmp_path / "failed", 2, **SIX_PAIRS, fails=1)
    assert [process["micro_batch"] for process in (*undisturbed, *failed)] == [4, 4, 4, 1]
    compare(failed[0]["events"], undisturbed[0]["events"], TOKEN_MEANS, tolerance=2e-5)


def test_two_processes_learn_from_the_answers_of_one(tmp_path):
    """Four groups of four answers per step: two in each process, four answers at a time in one and two in the other."""
    changes = {"gradient_accumulation_steps": 2, "mask_truncated_completions": False, "max_steps": 3}
    (one,) = train(tmp_path / "one", 1, "grpo", per_device_train_batch_size=8, **changes)
    two = train(tmp_path / "two", 2, "grpo", per_device_train_batch_size=4, ddp_backend="gloo", **changes)
    together = [[*first, *second] for first, second in zip(*(process["answers"] for process in two), strict=True)]
    assert together == one["answers"]
    compare(two[0]["events"], one["events"], (*SCORED, *TIMES), tolerance=1e-5)
    wanted, *found = (load_file(path) for path in (tmp_path / "one/0.safetensors", *(tmp_path / "two").glob("*.safe*")))
    assert len(found) == 2
    for weights in found:
        compare_weights(weights, wanted)


def test_out_of_memory_with_sharded_weights_ends_the_run(tmp_path):
    """All processes gather layers together, so one cannot retry alone; none waits for it forever."""
    (tmp_path / "run").mkdir()
    begun, changes = time.monotonic(), json.dumps({**SIX_PAIRS, "fails": 1})
    done = start(2, "tests.engine.train_together", str(tmp_path / "run"), "shared", changes, env=FSDP)
    assert done.returncode == 1
    assert "which sharded weights cannot lower during a run" in done.stderr
    assert time.monotonic() - begun < 120


SETTINGS = (*QUICK, *SIGMOID, "trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2")


def run(folder, processes, *arguments, module="smolvlm_exp", env=None):
    done = start(processes, module, *arguments, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, losses(folder), json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The command in one process: its folder, losses and summary."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, *run(folder, 1, *SETTINGS, "trainer.gradient_accumulation_steps=2", f"hydra.run.dir={folder}")[1:]


@pytest.mark.parametrize("sharded", [False, True])
def test_the_command_in_two_processes(tmp_path, alone, sharded):
    """One folder, with what one process would have written; a checkpoint of two is resumed in one."""
    module, env = ("tests.fsdp_on_cpu", FSDP) if sharded else ("smolvlm_exp", {})
    folder, (one, wanted, expected) = tmp_path / "two", alone
    out, logged, summary = run(folder, 2, *SETTINGS, f"hydra.run.dir={folder}", module=module, env=env)
    assert out.count("parameters trained") == 1
    assert logged == pytest.approx(wanted, abs=2e-5)
    mine, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, one))
    assert mine.keys() == theirs.keys()
    assert all((mine[name] - theirs[name]).abs().max() < 2e-4 for name in theirs)
    assert summary["before"] == pytest.approx(expected["before"], abs=1e-5)
    assert {c["verdict"] for c in summary["checks"]} == {c["verdict"] for c in expected["checks"]}
    if sharded:
        return
    (folder / "checkpoints" / "checkpoint-4").rename(tmp_path / "away")
    (folder / "summary.json").unlink()
    refused = start(1, "smolvlm_exp", f"resume={folder}")
    assert refused.returncode == 2
    assert "processes was 2 and is 1" in refused.stderr
    assert "trainer.gradient_accumulation_steps=2" in refused.stderr
    _, resumed, _ = run(folder, 1, f"resume={folder}", "trainer.gradient_accumulation_steps=2")
    assert resumed == pytest.approx(wanted, abs=2e-5)


def test_a_sweep_under_a_launcher_is_refused(tmp_path):
    refused = start(2, "smolvlm_exp", "-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert refused.returncode == 1  # the launcher's
    assert refused.stderr.count("a sweep starts its own processes") == 1
