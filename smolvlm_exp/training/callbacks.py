"""Around the training steps: metrics and sample answers to the run folder and the tracker, a clean stop on a signal."""

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.evaluation.held_out import HeldOut
from smolvlm_exp.reporting.trackers.tracker import Tracker
from smolvlm_exp.runs.checkpoint import checkpoints, disk_error_as_run_error
from smolvlm_exp.runs.event_log import append_event, truncate_after
from smolvlm_exp.utils.distributed import gather
from smolvlm_exp.utils.formatting import duration
from smolvlm_exp.utils.phases import phase
from smolvlm_exp.utils.signals import INTERRUPTED, STOPPED, StopRequest
from smolvlm_exp.utils.units import GIB

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"  # in the run folder
SAMPLES = "samples.jsonl"  # in the run folder, per line: {"step": 20, "answers": [...]}
SAMPLE_ROWS = 4  # the first held-out ones
SAMPLE_TOKENS = 128  # at most per answer: training waits for it
MIN_LOSSES = 8  # before one can stand out
SPIKE = 10.0  # median deviations over the median
ON_CONSOLE = (
    "loss", "reward", "frac_reward_zero_std", "completions/mean_length", "eval_loss", "rewards/accuracies",
    "rewards/margins", "eval_rewards/accuracies", "mean_token_accuracy", "grad_norm", "learning_rate",
)  # fmt: skip


def memory_stats() -> dict[str, float]:
    """GiB: allocated, reserved and peak on the GPU; the process's resident set and its peak on a CPU."""
    if torch.cuda.is_available():
        return {
            "memory_allocated_gib": torch.cuda.memory_allocated() / GIB,
            "memory_reserved_gib": torch.cuda.memory_reserved() / GIB,
            "memory_peak_gib": torch.cuda.max_memory_allocated() / GIB,
        }
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"memory_allocated_gib": psutil.Process().memory_info().rss / GIB, "memory_peak_gib": peak / GIB}


class MetricsCallback(TrainerCallback):
    """Every log event, with memory and speed added, to `metrics.jsonl`, the console and the tracker."""

    def __init__(self, folder: Path, tracker: Tracker) -> None:
        self.path = folder / METRICS
        self.tracker = tracker
        self.last_log = (0.0, 0, 0.0)  # clock, step, tokens
        self.evaluating = 0.0  # seconds of evaluation since the last log
        self.waiting = 0.0  # seconds without a batch since the last log
        self.step_end = 0.0
        self.idle = 0.0  # clock, when everything between two steps was done except fetching batches
        self.began = (0.0, 0)  # clock, step
        self.step_peak = 0.0  # GiB in a step; sampling answers takes what is free, which says nothing of training

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        truncate_after(self.path, state.global_step)
        self.idle = time.perf_counter()
        self.last_log = (self.idle, state.global_step, 0.0)
        self.began = (self.idle, state.global_step)
        first, steps = state.global_step + 1, state.max_steps
        resumed = state.global_step > 0
        log.info(f"resuming at step {first} of {steps}" if resumed else f"training: {steps} step{'s' * (steps > 1)}")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.waiting += time.perf_counter() - self.idle
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.step_peak = max(self.step_peak, memory_stats()["memory_peak_gib"])
        self.step_end = self.idle = time.perf_counter()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Also called after sample answers: the time since the step's end, or since the last call, was no training."""
        self.idle = time.perf_counter()
        self.evaluating += self.idle - self.step_end
        self.step_end = self.idle

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.idle = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        event = {"step": state.global_step, **(logs or {})}
        if "loss" in event:
            event |= self.speed(args, state, event.get("num_tokens", 0.0))
            usual = loss_spike([e["loss"] for e in state.log_history if "loss" in e])
            if usual is not None:
                log.warning(f"step {state.global_step}: loss spike, {event['loss']:.3g} (median so far {usual:.3g})")
        event |= self.memory()
        with disk_error_as_run_error(self.path.parent):
            append_event(self.path, event)
        self.tracker.log({k: v for k, v in event.items() if k != "step"}, state.global_step)
        if "loss" in event or "eval_loss" in event:
            tqdm.write(self.line(state, event))  # above a bar, where there is one
        self.idle = time.perf_counter()

    def line(self, state: TrainerState, event: dict[str, float]) -> str:
        """A log event on the console, with the time that the steps so far say is left."""
        parts = [f"step {state.global_step}/{state.max_steps}"]
        parts += [f"{key} {event[key]:.4g}" for key in ON_CONSOLE if key in event]
        if "pairs_per_second" in event:
            parts.append(f"{event['pairs_per_second']:.3g} pairs/s")
        clock, first = self.began
        per_step = (time.perf_counter() - clock) / max(state.global_step - first, 1)
        if left := per_step * (state.max_steps - state.global_step):
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def memory(self) -> dict[str, float]:
        """`memory_stats`, its peak that of the steps so far."""
        now = memory_stats()
        return {**now, "memory_peak_gib": self.step_peak or now["memory_peak_gib"]}

    def speed(self, args: TrainingArguments, state: TrainerState, tokens: float) -> dict[str, float]:
        """Since the last log, without evaluation: pairs and tokens per second, the share of time without a batch."""
        now = time.perf_counter()
        clock, step, before = self.last_log
        seconds = max(now - clock - self.evaluating, 1e-9)
        pairs = (state.global_step - step) * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        waited = self.waiting / seconds
        self.last_log, self.evaluating, self.waiting = (now, state.global_step, tokens), 0.0, 0.0
        return {
            "pairs_per_second": pairs / seconds,
            "tokens_per_second": max(tokens - before, 0.0) / seconds,
            "data_wait": waited,
        }


class SamplesCallback(TrainerCallback):
    """To `samples.jsonl` and the tracker; random state and the model's modes are left as they were."""

    def __init__(
        self,
        every: float,
        held_out: HeldOut,
        start: Callable[[], list[str]],
        metrics: MetricsCallback,
    ) -> None:
        """Every so many steps (below 1: a fraction of all; 0: never); `start`: the answers before the first."""
        self.every, self.held_out, self.metrics = every, held_out, metrics
        self.rows = [held_out.preferences.test[i] for i in range(min(SAMPLE_ROWS, len(held_out)))] if every else []
        self.start, self.path = start, metrics.path.with_name(SAMPLES)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        truncate_after(self.path, state.global_step)
        if self.rows and state.global_step == 0:
            self.record(state, self.start()[: len(self.rows)])

    @phase("samples")
    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        steps = math.ceil(self.every * state.max_steps) if self.every < 1 else int(self.every)
        if not self.rows or state.global_step % steps:
            return
        model = kwargs["model"]
        modes = [(module, module.training) for module in model.modules()]
        answers = self.held_out.answers(model, len(self.rows), Sampling(SAMPLE_TOKENS))
        for module, training in modes:
            module.training = training
        self.record(state, answers)
        self.metrics.on_evaluate()

    def record(self, state: TrainerState, answers: list[str]) -> None:
        append_event(self.path, {"step": state.global_step, "answers": answers})
        self.metrics.tracker.show_samples(self.rows, answers, state.global_step)


class ProgressBar(ProgressCallback):
    """Upstream's without its log lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None: ...


class EvaluationStopped(Exception):
    """A signal ended an evaluation between two steps."""


class StopCallback(StopRequest, TrainerCallback):
    """On Ctrl-C or SIGTERM: before the first step, KeyboardInterrupt; then finish the step, save, stop.

    An evaluation between two steps ends at its next batch; the one after the last step is finished, or left for
    `resume` at a second signal. Elsewhere a second signal leaves at once.
    """

    training = False  # from the first step on
    skipping = False  # within `skippable`: a second signal skips what is going on
    folder: Path | None = None  # the run's

    def agreed(self) -> bool:
        """Whether any process was signalled: all of them stop at the same step."""
        return any(gather(self.requested))

    def on_request(self) -> None:
        if not self.training:
            raise KeyboardInterrupt
        doing = "stopping after this step and saving; press Ctrl-C again to exit at once"
        if self.skipping:
            doing = "training is done: finishing the evaluation; press Ctrl-C again to leave it for resume"
        print(f"\n{doing}", file=sys.stderr)

    def leave(self, code: int) -> None:
        """At once, even if a tracker or a worker hangs. Nothing is lost: a run also survives kill -9."""
        if self.skipping:
            self.skipping = False
            raise KeyboardInterrupt
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(STOPPED if self.folder and checkpoints(self.folder) else INTERRUPTED)

    @contextlib.contextmanager
    def skippable(self) -> Iterator[None]:
        """Within, a second signal ends what is going on, and nothing else."""
        self.skipping = True
        try:
            yield
        except KeyboardInterrupt:
            pass
        finally:
            self.skipping = False

    def on_train_begin(self, args: TrainingArguments, *more: Any, **kwargs: Any) -> None:
        self.folder = Path(str(args.output_dir)).parent

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.training = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.agreed():
            control.should_save = control.should_training_stop = True
        return control

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if self.training and self.agreed():
            raise EvaluationStopped


def loss_spike(losses: Sequence[float]) -> float | None:
    """The median, where the last loss lies far above the others; None where it does not."""
    before = [loss for loss in losses[:-1] if math.isfinite(loss)][-50:]
    if len(before) < MIN_LOSSES or not math.isfinite(losses[-1]):
        return None
    usual = median(before)
    spread = median(abs(loss - usual) for loss in before)
    return usual if losses[-1] > max(usual + SPIKE * spread, 1.5 * usual) else None
