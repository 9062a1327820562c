"""Two processes on one machine's CPU (gloo), started as people start them, give one process's losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.test_trainer import TOKEN_MEANS, compare

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,Idefics3EncoderLayer", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip


def train(folder, processes, engine="shared", env=None, **changes):
    """What the first process logged."""
    folder.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "tests.engine.train_together", str(folder), engine, json.dumps(changes)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "0.json").read_text())


COUNTS = (*TOKEN_MEANS, "num_tokens", "samples_per_second")


@pytest.mark.parametrize("engine", ["shared", "shared_sft"])
@pytest.mark.parametrize("env", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_are_one(tmp_path, engine, env):
    """Twelve pairs a step: four at a time in one process; in each of two, six by two."""
    one = train(
        tmp_path / "one", 1, engine, per_device_train_batch_size=4, gradient_accumulation_steps=3,
        per_device_eval_batch_size=10,
    )  # fmt: skip
    two = train(
        tmp_path / "two", 2, engine, env, per_device_train_batch_size=2, gradient_accumulation_steps=3, micro_batch=4,
        per_device_eval_batch_size=5, ddp_backend="gloo",
    )  # fmt: skip
    # SFT's evaluation loss is a mean of the processes' means over tokens.
    compare(two, one, without=(*COUNTS, "eval_loss") if engine == "shared_sft" else COUNTS, tolerance=2e-5)
