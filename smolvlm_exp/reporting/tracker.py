"""Weights & Biases: online where there is an account, offline otherwise; it never asks."""

import contextlib
import logging
import netrc
import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import SplitResult, urlsplit

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.reporting.html import SMALL_EDGE
from smolvlm_exp.utils.errors import first_line
from smolvlm_exp.utils.fields import one_of
from smolvlm_exp.utils.files import read_json, write_json
from smolvlm_exp.utils.formatting import parse_number
from smolvlm_exp.utils.paths import relative_to_cwd

if TYPE_CHECKING:
    from wandb import Run

    from smolvlm_exp.reporting.summary import Sample

log = logging.getLogger(__name__)


INIT_TIMEOUT = 30.0  # seconds
PATIENCE = 60.0  # seconds to wait at a run's end for what is not sent yet


@dataclass
class TrackerConfig:
    type: str = one_of("wandb", "none")
    project: str = "smolvlm_exp"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


class BackgroundRun:
    """A W&B run in a thread of its own, so that it never stops or slows training. After a failure it sends no more."""

    def __init__(self, folder: Path, init: Callable[[], "Run"]) -> None:
        """
        Args:
            folder: that has everything too, for messages.
            init: begins the run; it is called in the thread.
        """
        self.folder, self.init = relative_to_cwd(folder), init
        self.jobs: queue.SimpleQueue[Callable[[Run], None] | None] = queue.SimpleQueue()
        self.put = self.jobs.put
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Wait for the jobs, PATIENCE seconds at most."""
        self.jobs.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            log.warning(f"W&B did not answer within {PATIENCE:g} s; giving up. All results are in {self.folder}")

    def work(self) -> None:
        try:
            run = self.init()
            while (job := self.jobs.get()) is not None:
                job(run)
        except (Exception, SystemExit) as error:  # W&B ends the program where it cannot log in
            log.warning(f"W&B failed ({first_line(error)}); nothing more is sent. All results are in {self.folder}")


class Tracker:
    """Sends one run to W&B; with `type=none` it does nothing."""

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
            settings: the resolved config.
            group: the sweep's name.
            differs: settings that tell this run from the sweep's others; they become tags and flat config keys.
            without_seed: the same on one line without the seed: grouped by it, W&B's table has task=compare's groups.
            kind: W&B's job type.
        """
        self.run: BackgroundRun | None = None
        if config.type == "none":
            return
        differs = differs or {}
        flat = {key: parse_number(value) for key, value in differs.items()}
        tags = [*config.tags, *(f"{key}={value}"[:64] for key, value in differs.items())]  # W&B's limit
        id, settings = run_id(folder), settings | flat | {"without_seed": without_seed}
        self.run = BackgroundRun(folder, lambda: init_run(config, folder, name, group, kind, tags, settings, id))
        if group is None:
            self.run.put(lambda run: log.info(upload_hint(not run.offline, Path(run.dir).parent)))

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.run:
            self.run.put(lambda run: run.log(values, step=step))

    def show_samples(self, rows: list[dict[str, Any]], answers: list[str], step: int) -> None:
        """A table of held-out rows with their answers at this step."""
        if not self.run:
            return
        questions, chosen = ([text_of(row[column]) for row in rows] for column in ("prompt", "chosen"))

        def show(run: "Run") -> None:
            import wandb

            images = [row["images"][0].copy() for row in rows]
            for image in images:  # small, because the table is uploaded many times
                image.thumbnail((SMALL_EDGE, SMALL_EDGE))
            data = [list(row) for row in zip(map(wandb.Image, images), questions, answers, chosen, strict=True)]
            columns: list[str | int] = ["image", "question", "answer", "chosen"]
            run.log({"samples": wandb.Table(columns=columns, data=data)}, step=step)

        self.run.put(show)

    def finish(self, summary: dict[str, Any], samples: "list[Sample]", exit_code: int = 0) -> None:
        """Send the result: the summary with flat keys, and a table of images with the answers before and after."""
        if not self.run:
            return
        self.run.put(lambda run: log_results(run, summary, samples, exit_code))
        self.run.close()


def log_results(run: "Run", summary: dict[str, Any], samples: "list[Sample]", exit_code: int) -> None:
    import wandb

    for part in ("before", "after", "train"):
        run.summary.update({f"{part}/{key}": value for key, value in summary.get(part, {}).items()})
    for key, (low, high) in summary.get("intervals", {}).get("after", {}).items():
        run.summary.update({f"after/{key}/low": low, f"after/{key}/high": high})
    for key, change in summary.get("changes", {}).items():
        run.summary.update({f"change/{key}": change["difference"], f"change/{key}/p": change["p"]})
    for name, measured in summary.get("speed", {}).items():
        for at in measured:
            run.summary.update({f"speed/{name}/{at['batch_size']}/{key}": value for key, value in at.items()})
    checks = summary.get("checks", [])
    if checks:
        run.summary.update({f"checks/{check['id']}": check["verdict"] for check in checks})
        columns: list[str | int] = list(checks[0])
        run.log({"checks": wandb.Table(columns=columns, data=[list(check.values()) for check in checks])})
    run.summary.update({key: summary[key] for key in ("status", "checks_passed") if key in summary})
    if samples:
        columns = ["image", "question", "before", "after", "chosen", "rejected"]
        rows = [[wandb.Image(s.image), s.question, s.before, s.after, s.chosen, s.rejected] for s in samples]
        run.log({"answers": wandb.Table(columns=columns, data=rows)})
    run.finish(exit_code=exit_code)


def run_id(folder: Path) -> str:
    """The run's id at W&B: a resumed run keeps the one it had."""
    path = folder / "wandb" / "id.json"
    if not (id := read_json(path).get("id")):
        id = secrets.token_hex(4)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"id": id})
    return str(id)


def init_run(
    config: TrackerConfig,
    folder: Path,
    name: str,
    group: str | None,
    job_type: str,
    tags: list[str],
    settings: dict[str, Any],
    id: str | None = None,
) -> "Run":
    """Online where there is an account and W&B answers, else offline; both in the run's folder."""
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
            id=id,
            resume="allow" if id else None,
            mode=mode,
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True, show_warnings=False, init_timeout=INIT_TIMEOUT, login_timeout=INIT_TIMEOUT
            ),
        )

    if has_account():
        try:
            if not server_reachable():
                raise OSError("its server cannot be reached")
            return init("online")
        except (Exception, SystemExit) as error:  # it ends the program where it cannot log in
            log.warning(f"W&B: offline ({first_line(error)})")
            wandb.teardown()  # else its service keeps the run that did not begin
    return init("offline")


def server() -> SplitResult:
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def server_reachable() -> bool:
    """Whether W&B's server takes a connection; its own client tries for minutes."""
    address = server()
    port = address.port or (443 if address.scheme == "https" else 80)
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return True  # a proxy's to say
    with contextlib.suppress(OSError), socket.create_connection((address.hostname or "", port), timeout=5):
        return True
    return False


def upload_hint(online: bool, *folders: Path) -> str:
    """Whether runs went online, and else how to upload these folders (or patterns for them)."""
    if online:
        return "W&B: online"
    return f"W&B: offline. To upload: wandb login && wandb sync {' '.join(str(relative_to_cwd(f)) for f in folders)}"


def track_table(
    config: TrackerConfig,
    folder: Path,
    kind: str,
    group: str,
    rows: list[dict[str, Any]],
    numbers: dict[str, Any],
    *others: Path,
) -> None:
    """A table of runs as a run of its own, with an artifact of `<kind>.csv` and `<kind>.html`.

    Args:
        numbers: the run's summary.
        others: patterns of further runs that the hint on uploading names.
    """
    if config.type == "none" or not rows:
        return

    def send_table(run: "Run") -> None:
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

    table = BackgroundRun(folder, lambda: init_run(config, folder, "table", group, kind, config.tags, {}))
    table.put(send_table)
    table.close()


def has_account() -> bool:
    """Whether W&B finds a key, without asking for one and without the network."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(server().hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
