"""What a run leaves behind: summary.json, the adapter, the report, the final table, the tracker's summary."""

import contextlib
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from smolvlm_exp.config.schema import Config
from smolvlm_exp.deploy.export.model_card import run_card
from smolvlm_exp.evaluation.answer_changes import AnswerChange, answer_changes, count_verdicts, save_answers
from smolvlm_exp.evaluation.checks import (
    Check,
    check_adapter_reload,
    check_answers_reload,
    compare_evaluations,
    reward_image_contribution,
)
from smolvlm_exp.evaluation.comparison import save_per_row
from smolvlm_exp.evaluation.held_out import Evaluation, HeldOut, evaluate
from smolvlm_exp.evaluation.preference import Logps
from smolvlm_exp.models.adapter import is_pissa, save_finetuned
from smolvlm_exp.models.resolution import Resolution
from smolvlm_exp.reporting.advice import advise
from smolvlm_exp.reporting.report import write_report
from smolvlm_exp.reporting.sampled_answers import COMPLETIONS, sampled_groups
from smolvlm_exp.reporting.summary import (
    Sample,
    print_phases,
    print_results,
    sample_histories,
    samples,
    save_images,
    summarize,
)
from smolvlm_exp.rewards.build import Rewards
from smolvlm_exp.runs.event_log import read_events
from smolvlm_exp.runs.find import choices
from smolvlm_exp.runs.resume_check import ROWS
from smolvlm_exp.tasks.provenance import code_provenance, hardware
from smolvlm_exp.tasks.tracking import tracker_of
from smolvlm_exp.training.callbacks import METRICS, SAMPLES, MetricsCallback, SamplesCallback
from smolvlm_exp.training.sanity_checks import ParameterMonitor, excuse_short_run
from smolvlm_exp.utils.errors import Pruned, isolated
from smolvlm_exp.utils.files import write_json, write_text
from smolvlm_exp.utils.formatting import duration
from smolvlm_exp.utils.hub import Provenance
from smolvlm_exp.utils.paths import relative_to_cwd
from smolvlm_exp.utils.phases import phase, seconds_by_phase
from smolvlm_exp.utils.versions import versions

log = logging.getLogger(__name__)


class Result:
    """Collects a run's results and writes them, whether it finishes, is stopped or fails."""

    before: Evaluation
    training: Any  # what the trainer's `train` returned
    after: Evaluation | None = None  # None: the run was stopped
    changes: Sequence[AnswerChange] = ()  # of the answers from `before` to `after`

    def __init__(
        self,
        config: Config,
        folder: Path,
        held_out: HeldOut,
        sources: Mapping[str, Provenance],
        base: dict[str, Any],
        rewards: Rewards | None = None,
    ) -> None:
        """
        Args:
            base: models/saved_check.py's `base_record`.
            rewards: of answers that a trainer samples; the answers to held-out rows are scored by them too.
        """
        self.config, self.folder, self.held_out = config, folder, held_out
        self.sources, self.base = sources, base
        self.score = rewards.score_answers if rewards else None
        self.preferences = preferences = held_out.preferences
        self.tracker = tracker_of(config, folder)
        self.summary: dict[str, Any] = {
            "status": "failed",
            "seed": config.seed,
            "settings": choices(folder),
            "sources": {name: asdict(source) for name, source in {**sources, "code": code_provenance()}.items()},
            "data": preferences.report,
            "held_out_rows": len(held_out),
            "before": {},
            "after": {},
            "train": {},
            "checks": [],
            "checks_passed": None,
            "versions": versions(),
            **({"reward_code": rewards.hashes} if rewards and rewards.hashes else {}),  # SHA-256 of a person's own
        }

    def __enter__(self) -> "Result":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            pruned, stopped = isinstance(error, Pruned), isinstance(error, KeyboardInterrupt)
            self.summary["status"] = "pruned" if pruned else "stopped" if stopped else "failed"
            reason = "Stopped before the first step." if stopped else f"{type(error).__name__}: {error}"
            self.summary["reason"] = str(error) if pruned else reason
            self.summary |= {"advice": self.advice(), **self.seconds()}
            with contextlib.suppress(OSError):  # a full disk may have ended the run
                write_json(self.folder / "summary.json", self.summary)
            if (self.folder / METRICS).is_file():
                self.report()
            with isolated("the tracker"):
                self.tracker.finish(self.summary, exit_code=0 if pruned else 1)
            for advice in self.summary["advice"]:
                print(advice, file=sys.stderr)

    def callbacks(self) -> list[TrainerCallback]:
        """Of the trainer: metrics, and sample answers."""
        self.metrics = MetricsCallback(self.folder, self.tracker)
        every = self.config.trainer.sample_steps
        return [self.metrics, SamplesCallback(every, self.held_out, lambda: self.before.answers, self.metrics)]

    @phase("evaluation_before")
    def evaluate_before(self, trainer: Any) -> None:
        """Called before training; the checks compare the weights too."""
        log.info(f"evaluating {len(self.held_out):,} held-out rows before training")
        self.monitor = ParameterMonitor(trainer.model)
        self.before = self.evaluate(trainer)

    @phase("evaluation_after")
    def evaluate_after(self, trainer: Any) -> None:
        log.info(f"evaluating {len(self.held_out):,} held-out rows after training")
        self.after = self.evaluate(trainer, self.before.logps)

    def evaluate(self, trainer: Any, reference: Logps | None = None) -> Evaluation:
        model, config = trainer.accelerator.unwrap_model(trainer.model), self.config
        scale, tokens = config.trainer.reward_scale, config.task.max_new_tokens
        return evaluate(model, self.held_out, reference, scale, max_new_tokens=tokens, score=self.score)

    @phase("saving")
    def save(self, trainer: Any) -> None:
        """Write and print everything; a stopped run has no adapter and no evaluation after training."""
        log.info("checking what was trained, saving the adapter and the report")
        model = trainer.accelerator.unwrap_model(trainer.model)
        checks = self.monitor.checks(trainer)
        if self.after:
            own = self.config.adapter
            save_finetuned(model, trainer.processing_class, own, self.folder, self.base, self.card())
            history = trainer.state.log_history
            checks += compare_evaluations(self.before, self.after, history, self.preferences.report)
            if self.score:
                tokens = self.config.task.max_new_tokens
                checks += reward_image_contribution(model, self.held_out, self.after.answers, self.score, tokens)
            checks += self.reload_check(trainer, model, self.after)
        self.summary |= {
            "status": "done" if self.after else "stopped",
            **summarize(self.before, self.after, excuse_short_run(checks, trainer)),
            "hardware": hardware(self.config, model),
            "train": self.training_summary(trainer, model),
            "data_digest": trainer.identity.get(ROWS),  # of the training rows
            **self.seconds(),
        }
        self.summary["advice"] = self.advice()
        if self.after:
            with isolated("the numbers of single rows"):
                save_per_row(self.folder, self.preferences.prints, self.after.ratios)
            with isolated("answers.jsonl"):
                self.changes = answer_changes(self.preferences, self.before, self.after)
                self.summary["answer_changes"] = count_verdicts(self.changes)
                save_answers(self.folder, self.changes)
            with isolated("README.md"):
                saved = self.folder / ("model" if self.config.adapter.type == "none" else "adapter")
                write_text(saved / "README.md", self.card())
        shown = self.report()
        with isolated("the tracker"):
            self.tracker.finish(self.summary, shown, completions=read_events(self.folder / COMPLETIONS))
        self.summary |= self.seconds()  # with the report's and the tracker's
        write_json(self.folder / "summary.json", self.summary)  # last: who reads `done` there finds all the rest
        with isolated("the table"):
            self.print()

    def card(self) -> str:
        """README.md of the adapter and of checkpoints, with the results that there are so far."""
        resolution = Resolution.of(self.held_out.processor.image_processor.to_dict())
        return run_card(asdict(self.config), self.summary, self.sources, asdict(resolution))

    def report(self) -> list[Sample]:
        """Write report.html; returns its samples from before and after training."""
        shown: list[Sample] = []
        with isolated("report.html"):
            shown = samples(self.preferences, self.changes)
            between = sample_histories(self.preferences, read_events(self.folder / SAMPLES))
            groups = sampled_groups(self.preferences.train, read_events(self.folder / COMPLETIONS))
            write_report(self.folder, self.summary, asdict(self.config), shown, between, groups)
            if shown:
                save_images(self.folder, shown)
        return shown

    def seconds(self) -> dict[str, Any]:
        """Of the whole run so far, from its imports on, and of each phase."""
        phases = seconds_by_phase()
        return {"seconds": sum(phases.values()), "seconds_by_phase": phases}

    def advice(self) -> list[str]:
        return advise(self.summary, asdict(self.config), read_events(self.folder / METRICS))

    def reload_check(self, trainer: Any, model: Any, after: Evaluation) -> list[Check]:
        """Whether the saved adapter gives the same numbers or answers, where it can be loaded into the model."""
        if not isinstance(model, PeftModel) or is_pissa(self.config.adapter) or trainer.is_fsdp_enabled:
            return []  # PiSSA's is saved for the original base
        if after.logps is None:
            return [check_answers_reload(model, self.folder, self.held_out, self.config.task.max_new_tokens)]
        return [check_adapter_reload(model, self.folder, self.held_out, after.logps)]

    def training_summary(self, trainer: Any, model: Any) -> dict[str, Any]:
        """The `train` part of summary.json."""
        losses = [event["loss"] for event in trainer.state.log_history if "loss" in event]
        trainable = total = sum(parameter.numel() for parameter in model.parameters())
        if isinstance(model, PeftModel):
            trainable, total = model.get_nb_trainable_parameters()
        seconds = self.training.metrics["train_runtime"]
        args, state = trainer.args, trainer.state
        best = state.best_global_step if state.best_model_checkpoint else None
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {
            "steps": trainer.state.global_step,
            "batch_size": batch,
            "seconds": seconds,
            "pairs_per_second": (trainer.state.global_step - trainer.resumed_at) * batch / seconds,
            "memory_peak_gib": self.metrics.memory()["memory_peak_gib"],
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "out_of_memory": getattr(trainer, "out_of_memory", 0),
            **({"best_step": best} if args.load_best_model_at_end else {}),  # null: the last weights stayed
            "not_finite": trainer.guard.skipped,  # steps whose update was skipped
            "trainable_parameters": trainable,
            "total_parameters": total,
            **({"resumed_at": trainer.resumed_at} if trainer.resumed_at else {}),  # `seconds` counts the steps since
        }

    def print(self) -> None:
        """The final table, the checks, the advice, speed and the report's path."""
        print_results(self.summary)
        for advice in self.summary["advice"]:
            print(f"advice: {advice}")
        train = self.summary["train"]
        where = "GPU memory" if torch.cuda.is_available() else "RAM (the whole process)"
        print(
            f"{train['steps']} steps in {duration(train['seconds'])}, {train['pairs_per_second']:.1f} pairs/s, peak "
            f"{train['memory_peak_gib']:.2f} GiB of {where}, {train['trainable_parameters']:,} of "
            f"{train['total_parameters']:,} parameters trained"
        )
        print_phases(self.summary["seconds_by_phase"])
        print(f"report: {relative_to_cwd(self.folder)}/report.html")
        if self.after:
            print(next_commands(self.folder))


def next_commands(folder: Path) -> str:
    """Three commands that go on from a finished run."""
    command, run = "python -m smolvlm_exp", shlex.quote(str(relative_to_cwd(folder)))
    commands = {
        f"{command} task=chat run={run}": "talk to it",
        f"{command} task=generate run={run} task.images=FOLDER": "its answers beside the base's",
        f"{command} task=export run={run}": "an ONNX model, compared with it",
    }
    width = max(map(len, commands))
    return "\n".join(["next:", *(f"  {typed:<{width}}  {does}" for typed, does in commands.items())])
