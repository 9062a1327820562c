"""Trackio: on this machine, in its own folder (TRACKIO_DIR); `trackio show` is its dashboard."""

from typing import Any

from smolvlm_exp.reporting.trackers.base import Client, Outcome, TrackedRun
from smolvlm_exp.reporting.trackers.config import TrackerConfig


def start(config: TrackerConfig, run: TrackedRun) -> "TrackioRun":
    import trackio

    return TrackioRun(
        trackio.init(
            project=config.project_name,
            name=run.name,
            group=run.group,
            config=dict(run.settings),
            resume="allow" if run.resumed else "never",
            embed=False,
        )
    )


class TrackioRun(Client):
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def finish(self, outcome: Outcome) -> None:
        self.run.log(outcome.values)
        self.run.finish()
