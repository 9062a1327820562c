"""What a run leaves behind: summary.json, the adapter, the report, the final table, the tracker's summary."""

import contextlib
import json
import platform
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table

from smolvlm_exp.adapter import save_tuned
from smolvlm_exp.config import Config
from smolvlm_exp.data.preferences import Preferences, text_of
from smolvlm_exp.errors import Pruned
from smolvlm_exp.evaluation.held_out import SAMPLES, Evaluation, hallucinated
from smolvlm_exp.report import Sample, write_report
from smolvlm_exp.runs import as_typed, choices, last_checkpoint, run_name
from smolvlm_exp.sweep.record import place_of
from smolvlm_exp.tracking import Tracker
from smolvlm_exp.training.callbacks import memory

PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets",
    "accelerate", "hydra-core", "omegaconf", "wandb", "pillow",
)  # fmt: skip


class Result:
    """Collects a run's findings and writes them, whether the run ends well, is stopped or fails."""

    before: Evaluation
    after: Evaluation | None = None
    training: Any
    checks: list[dict[str, Any]]

    def __init__(self, config: Config, folder: Path, preferences: Preferences) -> None:
        self.config, self.folder, self.preferences = config, folder, preferences
        self.began = time.perf_counter()
        self.resumed_at = int(last_checkpoint(Path(config.resume)).name[11:]) if config.resume else 0  # a step
        self.tracker = tracker_of(config, folder)
        self.summary: dict[str, Any] = {
            "status": "failed",
            "seed": config.seed,
            "settings": choices(folder),
            "data": preferences.report,
            "before": {},
            "after": {},
            "train": {},
            "checks": [],
            "versions": versions(),
        }

    def __enter__(self) -> "Result":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            pruned = isinstance(error, Pruned)
            self.summary["status"] = "pruned" if pruned else "failed"
            self.summary["reason"] = str(error) if pruned else f"{type(error).__name__}: {error}"
            self.write()
            self.tracker.finish(self.summary, [], exit_code=0 if pruned else 1)

    def save(self, trainer: Any, stopped: bool) -> None:
        """Write everything down; a stopped run leaves out what only a whole one has."""
        self.summary |= {
            "status": "stopped" if stopped else "done",
            "before": self.before.metrics,
            "after": self.after.metrics if self.after else {},
            "train": self.speed(trainer),
            "checks": self.checks,
            "seconds": time.perf_counter() - self.began,
        }
        if not stopped:
            save_tuned(trainer.accelerator.unwrap_model(trainer.model), self.config.adapter, self.folder)
        samples = self.samples() if self.after else []
        self.write()
        write_report(self.folder, self.summary, asdict(self.config), samples)
        self.tracker.finish(self.summary, samples)
        self.print()

    def speed(self, trainer: Any) -> dict[str, Any]:
        """The `train` part of summary.json."""
        history = [event for event in trainer.state.log_history if "loss" in event]
        model = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(model, "get_nb_trainable_parameters"):
            trainable, total = model.get_nb_trainable_parameters()
        else:
            trainable = total = sum(p.numel() for p in model.parameters())
        seconds = self.training.metrics["train_runtime"]
        arguments = trainer.args
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return {
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "pairs_per_second": (trainer.state.global_step - self.resumed_at) * batch / seconds,
            "memory_peak_gib": memory()["memory_peak_gib"],
            "first_loss": history[0]["loss"] if history else None,
            "last_loss": history[-1]["loss"] if history else None,
            "trainable_parameters": trainable,
            "total_parameters": total,
            **({"resumed_at": self.resumed_at} if self.resumed_at else {}),  # seconds are of the steps since
        }

    def samples(self) -> list[Sample]:
        """A dozen held-out rows with both answers, those whose answer changed first."""
        assert self.after is not None
        before, after, rows = self.before.answers, self.after.answers, self.preferences.test
        order = sorted(range(len(after)), key=lambda i: before[i] == after[i])[:SAMPLES]
        samples = []
        for i, row in ((i, rows[i]) for i in order):
            truth = row.get("truth")
            samples.append(
                Sample(
                    image=row["images"][0],
                    question=text_of(row["prompt"]),
                    chosen=text_of(row["chosen"]),
                    rejected=text_of(row["rejected"]),
                    before=before[i],
                    after=after[i],
                    hallucinated_before=hallucinated(before[i], truth),
                    hallucinated_after=hallucinated(after[i], truth),
                )
            )
        return samples

    def write(self) -> None:
        text = json.dumps(self.summary, indent=2, ensure_ascii=False)
        (self.folder / "summary.json").write_text(text + "\n", encoding="utf-8")

    def print(self) -> None:
        """The final table, the checks, and where everything lies."""
        console = Console()
        table = Table("held out", "before", "after", "change", title=None)
        before, after = self.summary["before"], self.summary["after"]
        for key in after or before:
            old, new = before.get(key), after.get(key)
            change = f"{new - old:+.3f}" if old is not None and new is not None else ""
            table.add_row(key, *(("" if v is None else f"{v:.3f}") for v in (old, new)), change)
        console.print(table)
        for check in self.summary["checks"]:
            console.print(f"{check['verdict']:>4}  {check['name']}: {check['value']:.2g} (bound {check['threshold']})")
        train = self.summary["train"]
        console.print(
            f"{train['steps']} steps in {train['seconds']:.0f} s, {train['pairs_per_second']:.1f} pairs/s, peak "
            f"{train['memory_peak_gib']:.2f} GiB, {train['trainable_parameters']:,} of {train['total_parameters']:,} "
            f"parameters trained; everything in {time.perf_counter() - self.began:.0f} s",
            highlight=False,
        )
        console.print(f"{as_typed(self.folder)}/report.html", highlight=False, soft_wrap=True)


def tracker_of(config: Config, folder: Path) -> Tracker:
    """A run's line to W&B, named by what tells the run from its sweep's others, or by what it sets."""
    group, differs = place_of(folder) or (None, {})
    told = " ".join(f"{key}={value}" for key, value in differs.items())
    name = " ".join(filter(None, (config.name, told))) or run_name(folder)
    return Tracker(config.tracker, asdict(config), folder, name, group, differs)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # wandb is not needed with tracker=none
            found[package] = version(package)
    return found
