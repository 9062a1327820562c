"""Weights & Biases: online where there is an account, offline otherwise, without a question."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.runs import as_typed
from smolvlm_exp.schema import one_of

if TYPE_CHECKING:
    from smolvlm_exp.report import Sample


@dataclass
class TrackerConfig:
    type: str = one_of("wandb", "none")
    project: str = "smolvlm_exp"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


class Tracker:
    """One run's line to W&B; with `type=none` it does nothing."""

    def __init__(
        self, config: TrackerConfig, settings: dict[str, Any], folder: Path, name: str, group: str | None = None
    ) -> None:
        self.run = None
        if config.type == "none":
            return
        import wandb

        mode = "online" if has_account() else "offline"
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=name,
            group=group,
            job_type="train",
            tags=config.tags,
            config=settings,
            dir=folder,
            mode=mode,  # type: ignore[arg-type]
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, show_warnings=False),
        )
        kept = as_typed(Path(self.run.dir).parent)
        hint = "" if mode == "online" else f"; to upload it: wandb login && wandb sync {kept}"
        print(f"wandb: {mode}{hint}")

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.run:
            self.run.log(values, step=step)

    def finish(self, summary: dict[str, Any], samples: "list[Sample]", exit_code: int = 0) -> None:
        """Hand over the result: the summary flat, and a table of pictures with the answers before and after."""
        if not self.run:
            return
        import wandb

        for part in ("before", "after", "train"):
            for key, value in summary.get(part, {}).items():
                self.run.summary[f"{part}/{key}"] = value
        self.run.summary["status"] = summary["status"]
        if samples:
            columns: list[str | int] = ["image", "question", "before", "after", "chosen", "rejected"]
            rows = [
                [wandb.Image(s.image), s.question, s.before, s.after, s.chosen, s.rejected] for s in samples
            ]  # fmt: skip
            self.run.log({"answers": wandb.Table(columns=columns, data=rows)})
        self.run.finish(exit_code=exit_code)


def has_account() -> bool:
    """Whether W&B finds a key, without asking for one and without the network."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or os.environ.get("WANDB_API_KEY"):
        return os.environ.get("WANDB_MODE") not in ("offline", "disabled")
    import netrc

    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def track_sweep(config: TrackerConfig, folder: Path, rows: list[dict[str, Any]]) -> None:
    pass
