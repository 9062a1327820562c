"""TensorBoard: event files in the run's folder, and the result as its HParams, by which runs are compared."""

from pathlib import Path
from typing import Any

from smolvlm_exp.reporting.trackers.base import Client, Outcome, TrackedRun
from smolvlm_exp.reporting.trackers.config import TrackerConfig

FOLDER = "tensorboard"  # in the run folder


def start(config: TrackerConfig, run: TrackedRun) -> "TensorBoardRun":
    return TensorBoardRun(run.folder / FOLDER, dict(run.settings))


class TensorBoardRun(Client):
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.writer: Any = None

    def writing(self, step: int | None) -> Any:
        """The writer, opened at the first step to log: what a resumed run logged from there on does not count."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=step)
        return self.writer

    def log(self, values: dict[str, float], step: int) -> None:
        writer = self.writing(step)
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # so that it can be watched

    def finish(self, outcome: Outcome) -> None:
        simple = {key: value if isinstance(value, int | float) else str(value) for key, value in self.settings.items()}
        writer = self.writing(None)
        writer.add_hparams(simple, outcome.numbers, run_name=".")
        writer.close()
