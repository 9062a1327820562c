"""A run's trackers, as many as its settings choose."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from smolvlm_exp.reporting.trackers.background import BackgroundRun
from smolvlm_exp.reporting.trackers.base import Client, Outcome, TrackedRun
from smolvlm_exp.reporting.trackers.config import TrackerConfig

if TYPE_CHECKING:
    from smolvlm_exp.reporting.summary import Sample

# Of a whole run, at its end, which its summary has under other names
TOTALS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


class Tracker:
    """Sends one run to its trackers; without any it does nothing."""

    def __init__(self, config: TrackerConfig, run: TrackedRun) -> None:
        self.runs = [BackgroundRun(name, run.folder, partial(start, name, config, run)) for name in config.chosen]

    def put(self, job: Callable[[Client], object]) -> None:
        for run in self.runs:
            run.put(job)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Upstream's names: `eval_loss` is sent as eval/loss, `loss` as train/loss."""
        from transformers.integrations.integration_utils import rewrite_logs

        named = rewrite_logs({key: value for key, value in values.items() if key not in TOTALS})
        self.put(lambda client: client.log(named, step))

    def show_samples(self, rows: list[dict[str, Any]], answers: list[str], step: int) -> None:
        """A table of held-out rows with their answers at this step."""
        self.put(lambda client: client.show_samples(rows, answers, step))

    def finish(
        self,
        summary: dict[str, Any],
        samples: "Sequence[Sample]" = (),
        exit_code: int = 0,
        completions: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Send the result; see `Outcome`."""
        outcome = Outcome(summary, samples, exit_code, completions)
        self.put(lambda client: client.finish(outcome))
        for run in self.runs:
            run.close()


def start(name: str, config: TrackerConfig, run: TrackedRun) -> Client:
    client: Client = import_module(f"smolvlm_exp.reporting.trackers.{name}").start(config, run)
    return client
