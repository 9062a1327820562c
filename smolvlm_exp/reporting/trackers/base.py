"""What every tracker is told of a run, in the same words: its name and settings, its numbers, its result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolvlm_exp.reporting.summary import Sample


COMPARED = ("before/", "after/", "change/", "train/", "checks/")


@dataclass(frozen=True)
class TrackedRun:
    """How trackers name and sort a run."""

    folder: Path
    name: str = ""  # no other run's
    group: str | None = None  # a sweep's name, or what repetitions with other seeds have in common
    kind: str = "train"  # W&B's job type
    tags: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # flat: {"adapter": "dora", "adapter/r": 8}
    resumed: bool = False
    in_sweep: bool = False  # which says itself how all of its runs are uploaded


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    summary: dict[str, Any]  # of summary.json
    samples: "Sequence[Sample]" = ()
    exit_code: int = 0
    completions: Sequence[dict[str, Any]] = ()  # of completions.jsonl, by step: answers that it was trained on

    @property
    def values(self) -> dict[str, Any]:
        """The summary under flat keys: before/ after/ change/ checks/ train/ seconds/ sources/ speed/."""
        summary = self.summary
        flat: dict[str, Any] = {key: summary[key] for key in ("status", "checks_passed") if key in summary}
        for part in ("before", "after", "train"):
            flat |= {f"{part}/{key}": value for key, value in summary.get(part, {}).items()}
        for name, source in summary.get("sources", {}).items():
            flat |= {f"sources/{name}/{key}": value for key, value in source.items() if value}
        flat |= {f"seconds/{key}": value for key, value in summary.get("seconds_by_phase", {}).items()}
        for key, (low, high) in summary.get("intervals", {}).get("after", {}).items():
            flat |= {f"after/{key}/low": low, f"after/{key}/high": high}
        for key, change in summary.get("changes", {}).items():
            flat |= {f"change/{key}": change["difference"], f"change/{key}/p": change["p"]}
        for name, measured in summary.get("speed", {}).items():
            for at in measured:
                flat |= {f"speed/{name}/{at['batch_size']}/{key}": value for key, value in at.items()}
        if checks := summary.get("checks"):
            flat |= {f"checks/{check['id']}": check["verdict"] for check in checks}
            flat["checks/passed"] = summary["checks_passed"]
        return flat

    @property
    def numbers(self) -> dict[str, float]:
        """The values that runs are compared by, without intervals and p-values."""
        shown = {key: value for key, value in self.values.items() if key.count("/") == 1 and key.startswith(COMPARED)}
        return {key: float(value) for key, value in shown.items() if isinstance(value, int | float)}


class Client:
    """A run at one tracker. All of its methods are called in one thread."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Keys begin with train/ or eval/."""
        raise NotImplementedError

    def show_samples(self, rows: list[dict[str, Any]], answers: list[str], step: int) -> None:
        """Held-out rows with their answers at this step, where the tracker has tables with images."""

    def finish(self, outcome: Outcome) -> None:
        raise NotImplementedError
