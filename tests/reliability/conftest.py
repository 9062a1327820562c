"""What the promises are tried on: small runs of the real trainers, in this process and in forks of it.

A fork has torch and the rows already, so that a run of eight steps that is killed and goes on costs a second.
"""

import contextlib
import functools
import gc
import json
import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra._internal.utils import get_args_parser

from smolvlm_exp.config.compose import check_command
from smolvlm_exp.evaluation.held_out import HeldOut
from smolvlm_exp.models.adapter import lora_config
from smolvlm_exp.models.model import load_model
from smolvlm_exp.models.quant import quantization_config
from smolvlm_exp.reporting.sampled_answers import COMPLETIONS
from smolvlm_exp.rewards.build import Rewards
from smolvlm_exp.runs.checkpoint import checkpoint_folders, newest_intact
from smolvlm_exp.runs.resume_check import check_same_run
from smolvlm_exp.tasks.command import complete_and_check
from smolvlm_exp.training.arguments import TrainerInputs
from smolvlm_exp.training.callbacks import MetricsCallback, StopCallback
from smolvlm_exp.training.on_policy_callback import OnPolicyCallback
from tests.conftest import SIGMOID, compose

# Two epochs of four steps; DoRA with dropout on, checkpointing, a window of two steps a log, a checkpoint every third.
LONG = (
    *SIGMOID, "tracker=none", "data.train_rows=16", "data.test_rows=4", "trainer.max_steps=8",
    "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2", "trainer.warmup_steps=2",
    "trainer.eval_strategy=steps",
    "trainer.per_device_eval_batch_size=4", "trainer.logging_steps=2", "trainer.eval_steps=2", "trainer.save_steps=3",
    "adapter.r=2", "adapter.lora_dropout=0.1", "trainer.disable_dropout=false", "trainer.learning_rate=1e-3",
    "trainer.extra.disable_tqdm=true",
)  # fmt: skip
SHORTEST = ("trainer.max_steps=1", "trainer.save_steps=1", "trainer.eval_strategy=no", "trainer.logging_steps=1")
TOKEN = "hf_" + "aB3" * 11  # the form of one
CARD = "# A model card of a usual length\n" * 150
CLOCKS = ("runtime", "per_second", "total_flos", "gib", "data_wait", "sampling_time", "step_time")
# Of no meaning, but different from answer to answer.
EARNED = Rewards(
    {"sums": lambda completion_ids, **_: [sum(ids) % 11 for ids in completion_ids]},
    {"sums": 1.0},
    "sum_then_normalize",
    {},
)


class Bench:
    """Runs of `LONG` with changes, from the rows on: no model is looked at before or after training."""

    def __init__(self, processor: Any, preferences: Any, cache: Path, model: str = "embedded") -> None:
        self.processor, self.preferences, self.cache, self.model = processor, preferences, cache, model
        self.config = functools.cache(self.compose)

    def compose(self, *overrides: str) -> Any:
        unknown = {"trainer=grpo": SIGMOID, "trainer=sft": (*SIGMOID, "trainer.disable_dropout=false")}
        long = [o for o in LONG if not any(o in unknown.get(other, ()) for other in overrides)]
        plus = [f"+{o}" if ".extra." in o else o for o in (*long, *overrides)]
        return compose(f"model.id={self.model}", *plus, f"trainer.cache={self.cache}", "trainer.cache_ram=0MiB")

    def trainer(self, folder: Path, *overrides: str, callbacks: tuple = ()) -> Any:
        config = self.config(*overrides)
        quantization = quantization_config(config.quant, torch.float32)
        algorithm = import_module(f"smolvlm_exp.training.{config.trainer.algorithm}")
        arguments = algorithm.build_arguments(config.trainer, folder, "float32", None, config.seed)
        tracker = SimpleNamespace(log=lambda values, step: None)
        model = load_model(config.model, quantization, config.seed)
        identity = check_same_run(asdict(config), None, self.preferences, model)
        parts = TrainerInputs(
            model,
            lora_config(config.adapter, quantised=quantization is not None),
            HeldOut(self.preferences, self.processor, 8, None),
            [MetricsCallback(folder, tracker), *callbacks], folder, identity, EARNED, CARD,
        )  # fmt: skip
        parts.peft_config.target_modules = r".*text_model\.layers\.[01]\.self_attn\.(q|v)_proj"
        return algorithm.build_trainer(config.trainer, arguments, parts)

    def moved(self, trainer: Any, folder: Path) -> Any:
        """A trainer that has not begun, to another folder."""
        folder.mkdir(parents=True, exist_ok=True)
        trainer.args.output_dir = str(folder / "checkpoints")
        metrics = next(c for c in trainer.callback_handler.callbacks if isinstance(c, MetricsCallback))
        metrics.path = folder / "metrics.jsonl"
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, OnPolicyCallback):
                callback.path = folder / COMPLETIONS
        return trainer

    def run(self, folder: Path, *overrides: str, callbacks: tuple = (), prepare: Any = None) -> Any:
        """Train to the end, from the newest whole checkpoint where there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        trainer = self.trainer(folder, *overrides, callbacks=callbacks)
        if prepare:
            prepare(trainer)
        checkpoint = str(newest_intact(folder)) if checkpoint_folders(folder) else None
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    def stoppable(self, folder: Path, *overrides: str, prepare: Any = None) -> tuple[Any, StopCallback]:
        """As `run`, with signals heard."""
        with StopCallback() as stop:
            return self.run(folder, *overrides, callbacks=(stop,), prepare=prepare), stop


@pytest.fixture(scope="session")
def bench(processor, tmp_path_factory, small):
    from smolvlm_exp.data.preferences import load_preferences

    preferences = load_preferences(compose(*LONG[:5]).data, processor, tmp_path_factory.mktemp("rows"))
    return Bench(processor, preferences, tmp_path_factory.mktemp("cache"), str(small))


def logged(folder: Path) -> list[dict[str, Any]]:
    """The events of metrics.jsonl, save clocks and memory."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if not any(c in k for c in CLOCKS)} for e in events if "train_loss" not in e]


def learnt(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def forked(job: Callable[[], Any], log: Path) -> int:
    """Run `job` in a fork of this process; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()  # its data workers die with it
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(number, 1)
        os.dup2(number, 2)
        sys.stdout = sys.stderr = os.fdopen(number, "w")
        torch.set_num_threads(1)
        job()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill(child: int) -> None:
    """kill -9, to a fork and what it started."""
    with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
        os.killpg(child, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)


@pytest.fixture(scope="session")
def built(bench, tmp_path_factory):
    """A run with one checkpoint, made where the environment holds secrets."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
            patch.setenv(name, TOKEN)
        bench.run(folder, *SHORTEST)
    return folder


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """The folder of the smallest run, left alone; beside it is how many points it has."""
    from tests.reliability.crash_points import CrashPoints
    from tests.reliability.smallest import PRELOADED, SMALLEST, ended, typed

    for module in ("pandas", *(f"smolvlm_exp.{name}" for name in PRELOADED)):
        import_module(module)  # once, not in every fork
    gc.freeze()
    folder = tmp_path_factory.mktemp("alone")
    words, log = [*SMALLEST, f"hydra.run.dir={folder}/run"], folder / "log"
    code, said = ended(typed(words, log, lambda: CrashPoints(folder / "run", folder / "points")), log)
    assert code == 0, said[-3000:]
    return folder / "run"


def command_line(*overrides: str, config_dir: Path | None = None, multirun: bool = False) -> Namespace:
    """What `main` reads, completed and checked."""
    flags = [*(["--config-dir", str(config_dir)] if config_dir else []), *(["-m"] if multirun else [])]
    args = get_args_parser().parse_args([*flags, "--", *overrides])
    complete_and_check(args)
    return args


def typed(*overrides, **options):
    given = {"multirun": False, "config_path": None, "config_name": None, "config_dir": None, **options}
    return check_command(SimpleNamespace(overrides=list(overrides), **given))
