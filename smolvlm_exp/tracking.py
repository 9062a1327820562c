"""Weights & Biases: online where there is an account, offline otherwise, without a question."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.preferences import text_of
from smolvlm_exp.page import SMALL_EDGE
from smolvlm_exp.runs import as_typed
from smolvlm_exp.schema import one_of
from smolvlm_exp.sweep.jobs import typed

if TYPE_CHECKING:
    from PIL.Image import Image
    from wandb import Run

    from smolvlm_exp.cards import Sample


@dataclass
class TrackerConfig:
    type: str = one_of("wandb", "none")
    project: str = "smolvlm_exp"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


class Tracker:
    """One run's line to W&B; with `type=none` it does nothing."""

    def __init__(
        self,
        config: TrackerConfig,
        settings: dict[str, Any],
        folder: Path,
        name: str,
        group: str | None = None,
        differs: dict[str, str] | None = None,
        without_seed: str = "",
    ) -> None:
        """
        Args:
            settings: the whole configuration.
            group: the sweep's name.
            differs: what tells this run from the sweep's others; it becomes tags, and flat numbers in W&B's config.
            without_seed: the same in a line, its seed left out: W&B's table grouped by it has task=compare's groups.
        """
        self.run = None
        if config.type == "none":
            return
        differs = differs or {}
        flat = {key: typed(value) for key, value in differs.items()}
        tags = [*config.tags, *(f"{key}={value}"[:64] for key, value in differs.items())]  # W&B's limit
        self.run = start(config, folder, name, group, "train", tags, settings | flat | {"without_seed": without_seed})
        if group is None:
            print(uploading(Path(self.run.dir).parent))

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.run:
            self.run.log(values, step=step)

    def show_samples(self, rows: list[dict[str, Any]], answers: list[str], step: int) -> None:
        """A table of held-out rows of the normal form, with their answers at this step."""
        if not self.run:
            return
        import wandb

        columns: list[str | int] = ["image", "question", "answer", "chosen"]
        data = [
            [wandb.Image(small(row["images"][0])), text_of(row["prompt"]), answer, text_of(row["chosen"])]
            for row, answer in zip(rows, answers, strict=True)
        ]
        self.log({"samples": wandb.Table(columns=columns, data=data)}, step)

    def finish(self, summary: dict[str, Any], samples: "list[Sample]", exit_code: int = 0) -> None:
        """Hand over the result: the summary flat, with intervals, and pictures with the answers before and after."""
        if not self.run:
            return
        import wandb

        for part in ("before", "after", "train"):
            for key, value in summary.get(part, {}).items():
                self.run.summary[f"{part}/{key}"] = value
        for key, (low, high) in summary.get("intervals", {}).get("after", {}).items():
            self.run.summary.update({f"after/{key}/low": low, f"after/{key}/high": high})
        for key, change in summary.get("changes", {}).items():
            self.run.summary.update({f"change/{key}": change["difference"], f"change/{key}/p": change["p"]})
        checks = summary.get("checks", [])
        for check in checks:
            self.run.summary[f"checks/{check['name']}"] = check["verdict"]
        if checks:
            columns: list[str | int] = list(checks[0])
            self.run.log({"checks": wandb.Table(columns=columns, data=[list(check.values()) for check in checks])})
        self.run.summary["status"] = summary["status"]
        if samples:
            columns = ["image", "question", "before", "after", "chosen", "rejected"]
            rows = [
                [wandb.Image(s.image), s.question, s.before, s.after, s.chosen, s.rejected] for s in samples
            ]  # fmt: skip
            self.run.log({"answers": wandb.Table(columns=columns, data=rows)})
        self.run.finish(exit_code=exit_code)


def small(image: "Image") -> "Image":
    """A copy, for a table that is uploaded again and again."""
    copy = image.copy()
    copy.thumbnail((SMALL_EDGE, SMALL_EDGE))
    return copy


def start(
    config: TrackerConfig,
    folder: Path,
    name: str,
    group: str | None,
    job_type: str,
    tags: list[str],
    settings: dict[str, Any],
) -> "Run":
    import wandb

    return wandb.init(
        project=config.project,
        entity=config.entity,
        name=name,
        group=group,
        job_type=job_type,
        tags=tags,
        config=settings,
        dir=folder,
        mode="online" if has_account() else "offline",
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, show_warnings=False),
    )


def uploading(*folders: Path) -> str:
    """Whether runs went online, and else how to upload these folders (or patterns for them)."""
    if has_account():
        return "wandb: online"
    return f"wandb: offline; to upload it: wandb login && wandb sync {' '.join(str(as_typed(f)) for f in folders)}"


def track_sweep(config: TrackerConfig, folder: Path, group: str, rows: list[dict[str, Any]]) -> None:
    """The whole sweep as one more run of its group: the table, and an artifact with sweep.csv and sweep.html."""
    statuses = [row["status"] for row in rows]
    numbers = {status: statuses.count(status) for status in statuses}
    track_table(config, folder, "sweep", group, rows, numbers, folder / "*" / "wandb" / "offline-run-*")


def track_table(
    config: TrackerConfig,
    folder: Path,
    kind: str,
    group: str,
    rows: list[dict[str, Any]],
    numbers: dict[str, Any],
    *others: Path,
) -> None:
    """Many runs as one: a table, and an artifact with `<kind>.csv` and `<kind>.html`.

    Args:
        numbers: for the run's summary.
        others: patterns of runs that may be uploaded with it.
    """
    if config.type == "none" or not rows:
        return
    import wandb

    run = start(config, folder, "table", group, kind, config.tags, {})
    values: list[list[Any]] = [list(row.values()) for row in rows]
    run.log({kind: wandb.Table(columns=list(rows[0]), data=values, allow_mixed_types=True)})
    artifact = wandb.Artifact(group.replace(" ", "-"), type=kind)
    for name in (f"{kind}.csv", f"{kind}.html"):
        artifact.add_file(str(folder / name))
    run.log_artifact(artifact)
    run.summary.update(numbers)
    run.finish()
    print(uploading(folder / "wandb" / "offline-run-*", *others))


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
