"""Weights & Biases: online where there is an account, offline otherwise, without a question."""

import contextlib
import logging
import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.reporting.html import SMALL_EDGE
from smolvlm_exp.utils.fields import one_of
from smolvlm_exp.utils.files import read_json, write_json
from smolvlm_exp.utils.formatting import parse_number
from smolvlm_exp.utils.paths import relative_to_cwd

if TYPE_CHECKING:
    from PIL.Image import Image
    from wandb import Run

    from smolvlm_exp.reporting.samples import Sample

log = logging.getLogger(__name__)


ANSWERS = 30.0  # seconds that W&B has to answer when a run begins
PATIENCE = 60.0  # seconds that it has to take the rest when a run is at its end


@dataclass
class TrackerConfig:
    type: str = one_of("wandb", "none")
    project: str = "smolvlm_exp"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


class Tracker:
    """One run's line to W&B, beside the run and never in its way; with `type=none` it does nothing."""

    def __init__(
        self,
        config: TrackerConfig,
        settings: dict[str, Any],
        folder: Path,
        name: str,
        group: str | None = None,
        differs: dict[str, str] | None = None,
        without_seed: str = "",
        kind: str = "train",
    ) -> None:
        """
        Args:
            settings: the whole configuration.
            group: the sweep's name.
            differs: what tells this run from the sweep's others; it becomes tags, and flat numbers in W&B's config.
            without_seed: the same in a line, its seed left out: W&B's table grouped by it has task=compare's groups.
            kind: of job, as W&B's table can be filtered by.
        """
        self.folder, self.line = folder, None
        if config.type == "none":
            return
        differs = differs or {}
        flat = {key: parse_number(value) for key, value in differs.items()}
        tags = [*config.tags, *(f"{key}={value}"[:64] for key, value in differs.items())]  # W&B's limit
        own, settings = identity(folder), settings | flat | {"without_seed": without_seed}
        self.line = BackgroundWorker("wandb", lambda: init_run(config, folder, name, group, kind, tags, settings, own))
        if group is None:
            self.line.put(lambda run: log.info(upload_hint(not run.offline, Path(run.dir).parent)))

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.line:
            self.line.put(lambda run: run.log(values, step=step))

    def show_samples(self, rows: list[dict[str, Any]], answers: list[str], step: int) -> None:
        """A table of held-out rows of the normal form, with their answers at this step."""
        if not self.line:
            return
        questions, chosen = ([text_of(row[column]) for row in rows] for column in ("prompt", "chosen"))

        def show(run: "Run") -> None:
            import wandb

            pictures = [wandb.Image(small(row["images"][0])) for row in rows]
            data = [list(row) for row in zip(pictures, questions, answers, chosen, strict=True)]
            columns: list[str | int] = ["image", "question", "answer", "chosen"]
            run.log({"samples": wandb.Table(columns=columns, data=data)}, step=step)

        self.line.put(show)

    def finish(self, summary: dict[str, Any], samples: "list[Sample]", exit_code: int = 0) -> None:
        """Hand over the result: the summary flat, with intervals, and pictures with the answers before and after."""
        if not self.line:
            return
        self.line.put(lambda run: log_results(run, summary, samples, exit_code))
        if not self.line.close(PATIENCE):
            log.warning(f"wandb: does not answer, so it is left behind; {relative_to_cwd(self.folder)} has everything")


def log_results(run: "Run", summary: dict[str, Any], samples: "list[Sample]", exit_code: int) -> None:
    import wandb

    for part in ("before", "after", "train"):
        for key, value in summary.get(part, {}).items():
            run.summary[f"{part}/{key}"] = value
    for key, (low, high) in summary.get("intervals", {}).get("after", {}).items():
        run.summary.update({f"after/{key}/low": low, f"after/{key}/high": high})
    for key, change in summary.get("changes", {}).items():
        run.summary.update({f"change/{key}": change["difference"], f"change/{key}/p": change["p"]})
    for name, measured in summary.get("speed", {}).items():
        for each in measured:
            run.summary.update({f"speed/{name}/{each['batch_size']}/{key}": value for key, value in each.items()})
    checks = summary.get("checks", [])
    for check in checks:
        run.summary[f"checks/{check['id']}"] = check["verdict"]
    if checks:
        columns: list[str | int] = list(checks[0])
        run.log({"checks": wandb.Table(columns=columns, data=[list(check.values()) for check in checks])})
    run.summary.update({key: summary[key] for key in ("status", "checks_passed") if key in summary})
    if samples:
        columns = ["image", "question", "before", "after", "chosen", "rejected"]
        rows = [[wandb.Image(s.image), s.question, s.before, s.after, s.chosen, s.rejected] for s in samples]
        run.log({"answers": wandb.Table(columns=columns, data=rows)})
    run.finish(exit_code=exit_code)


def identity(folder: Path) -> str:
    """The run's name at W&B: a resumed run goes on with the one it had."""
    path = folder / "wandb" / "id.json"
    known = read_json(path).get("id")
    if known:
        return str(known)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = secrets.token_hex(4)
    write_json(path, {"id": new})
    return new


def small(image: "Image") -> "Image":
    """A copy, for a table that is uploaded again and again."""
    copy = image.copy()
    copy.thumbnail((SMALL_EDGE, SMALL_EDGE))
    return copy


def init_run(
    config: TrackerConfig,
    folder: Path,
    name: str,
    group: str | None,
    job_type: str,
    tags: list[str],
    settings: dict[str, Any],
    identity: str | None = None,
) -> "Run":
    """Online where there is an account and W&B answers, else offline; both in the run's own folder."""
    import wandb

    def init(mode: Literal["online", "offline"]) -> "Run":
        return wandb.init(
            project=config.project,
            entity=config.entity,
            name=name,
            group=group,
            job_type=job_type,
            tags=tags,
            config=settings,
            dir=folder,
            id=identity,
            resume="allow" if identity else None,
            mode=mode,
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, show_warnings=False, init_timeout=ANSWERS, login_timeout=ANSWERS),
        )

    if has_account():
        try:
            if not server_reachable():
                raise OSError("it cannot be reached")
            return init("online")
        except (Exception, SystemExit) as error:  # it ends the program where it cannot log in
            log.warning(f"wandb: offline, because {(str(error) or type(error).__name__).splitlines()[0]}")
            wandb.teardown()  # else its service holds on to the run that did not begin
    return init("offline")


def server_reachable() -> bool:
    """Whether W&B's server takes a connection: its own client tries for minutes."""
    address = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    port = address.port or (443 if address.scheme == "https" else 80)
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return True  # a proxy's to say
    with contextlib.suppress(OSError), socket.create_connection((address.hostname or "", port), timeout=5):
        return True
    return False


def upload_hint(online: bool, *folders: Path) -> str:
    """Whether runs went online, and else how to upload these folders (or patterns for them)."""
    if online:
        return "wandb: online"
    return (
        f"wandb: offline; to upload it: wandb login && wandb sync {' '.join(str(relative_to_cwd(f)) for f in folders)}"
    )


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

    def hand_over_table(run: "Run") -> None:
        import wandb

        values: list[list[Any]] = [list(row.values()) for row in rows]
        run.log({kind: wandb.Table(columns=list(rows[0]), data=values, allow_mixed_types=True)})
        artifact = wandb.Artifact(group.replace(" ", "-"), type=kind)
        for name in (f"{kind}.csv", f"{kind}.html"):
            artifact.add_file(str(folder / name))
        run.log_artifact(artifact)
        run.summary.update(numbers)
        run.finish()
        log.info(upload_hint(not run.offline, folder / "wandb" / "offline-run-*", *others))

    line = BackgroundWorker("wandb", lambda: init_run(config, folder, "table", group, kind, config.tags, {}))
    line.put(hand_over_table)
    if not line.close(PATIENCE):
        log.warning(f"wandb: does not answer, so it is left behind; {relative_to_cwd(folder)} has everything")


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


class BackgroundWorker:
    """Jobs in their order in a thread of their own. After the first failure the others are left out, which is said."""

    def __init__(self, name: str, open: Callable[[], Any]) -> None:
        """
        Args:
            name: of the service, for messages.
            open: makes what each job is called with; it runs in the thread too.
        """
        self.name, self.open = name, open
        self.jobs: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def put(self, job: Callable[[Any], None]) -> None:
        self.jobs.put(job)

    def close(self, patience: float) -> bool:
        """Wait for the jobs, `patience` seconds at most; whether all were done or given up by then."""
        self.jobs.put(None)
        self.thread.join(patience)
        return not self.thread.is_alive()

    def work(self) -> None:
        try:
            client = self.open()
            while (job := self.jobs.get()) is not None:
                job(client)
        except (Exception, SystemExit) as error:  # W&B ends the program where it cannot log in
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning(f"{self.name}: no more is sent ({reason}); the run goes on, and its folder has everything")
