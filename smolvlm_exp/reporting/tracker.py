"""Weights & Biases: online where there is an account, offline otherwise; it never prompts."""

import contextlib
import logging
import netrc
import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.truth import truth_text
from smolvlm_exp.reporting.html import SMALL_EDGE
from smolvlm_exp.reporting.sampled_answers import completions_table
from smolvlm_exp.utils.errors import RequestError, first_line, suggestion
from smolvlm_exp.utils.fields import one_of
from smolvlm_exp.utils.files import read_json, write_json
from smolvlm_exp.utils.formatting import parse_number
from smolvlm_exp.utils.paths import relative_to_cwd

if TYPE_CHECKING:
    from wandb import Run

    from smolvlm_exp.reporting.summary import Sample

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30.0  # seconds
MAX_TAG = 64  # letters
MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
PROJECT = "smolvlm_exp"
PATIENCE = 60.0  # seconds to wait at a run's end for what has not been sent


@dataclass
class TrackerConfig:
    type: str = one_of("wandb", "none")
    project: str | None = None  # null: WANDB_PROJECT, or smolvlm_exp
    entity: str | None = None  # null: WANDB_ENTITY, or the account's own
    tags: list[str] = field(default_factory=list)


def check_tracker(config: TrackerConfig) -> None:
    """W&B's own rules, which it applies in the background, after the start.

    Raises:
        RequestError: W&B would refuse a name, a tag or its mode, and the run would go untracked.
    """
    if config.type == "none":
        return
    for name, project in (("tracker.project", config.project), ("WANDB_PROJECT", os.environ.get("WANDB_PROJECT"))):
        if project and (len(project) > 128 or set(project) & set("/\\#?%:")):
            raise RequestError(f"{name}={project}: at most 128 letters, and none of / \\ # ? % :")
    if "" in (config.project, config.entity):
        raise RequestError("tracker.project and tracker.entity: leave them out, or give them a name.")
    wrong = next((tag for tag in config.tags if not 1 <= len(tag) <= MAX_TAG), None)
    if wrong is not None:
        raise RequestError(f"tracker.tags: {wrong[:MAX_TAG]!r} has {len(wrong)} letters, and W&B takes 1 to {MAX_TAG}.")
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in MODES:
        raise RequestError(f"WANDB_MODE={mode}: {suggestion(mode, list(MODES))}")


def is_tracked(config: TrackerConfig) -> bool:
    return config.type != "none" and os.environ.get("WANDB_MODE") != "disabled"


class BackgroundRun:
    """A W&B run in a thread of its own, so that it never stops or slows training. After a failure it sends no more."""

    def __init__(self, config: TrackerConfig, folder: Path, options: dict[str, Any]) -> None:
        """`options` are further arguments of wandb.init."""
        self.folder = relative_to_cwd(folder)
        self.jobs: queue.SimpleQueue[Callable[[Run], object] | None] = queue.SimpleQueue()
        self.put = self.jobs.put
        self.thread = threading.Thread(target=self.work, args=(config, folder, options), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Wait for the jobs, PATIENCE seconds at most."""
        self.jobs.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            log.warning(f"W&B did not answer within {PATIENCE:g} s; giving up. All results are in {self.folder}")

    def work(self, config: TrackerConfig, folder: Path, options: dict[str, Any]) -> None:
        try:
            run = init_run(config, folder, options)
            while (job := self.jobs.get()) is not None:
                job(run)
        except (Exception, SystemExit) as error:  # W&B ends the program where it cannot log in
            log.warning(f"W&B failed ({first_line(error)}); nothing more is sent. All results are in {self.folder}")


class Tracker:
    """Sends one run to W&B; with `type=none` or WANDB_MODE=disabled it does nothing."""

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
        if not is_tracked(config):
            return
        differs = differs or {}
        flat = {key: parse_number(value) for key, value in differs.items()}
        options = {
            "id": run_id(folder),
            "name": name,
            "group": group,
            "job_type": kind,
            "tags": [*config.tags, *(f"{key}={value}"[:MAX_TAG] for key, value in differs.items())],
            "config": settings | flat | {"without_seed": without_seed},
        }
        self.run = BackgroundRun(config, folder, options)
        if group is None:
            self.run.put(lambda run: log_upload_hint(run, Path(run.dir).parent))

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.run:
            self.run.put(lambda run: run.log(values, step=step))

    def show_samples(self, rows: list[dict[str, Any]], answers: list[str], step: int) -> None:
        """A table of held-out rows with their answers at this step."""
        if not self.run:
            return

        def show(run: "Run") -> None:
            import wandb

            data, pairs = [], "chosen" in rows[0]
            for row, answer in zip(rows, answers, strict=True):
                image = row["images"][0].copy()
                image.thumbnail((SMALL_EDGE, SMALL_EDGE))  # because the table is uploaded many times
                known = text_of(row["chosen"]) if pairs else truth_text(row["truth"])
                data.append([wandb.Image(image), text_of(row["prompt"]), answer, known])
            columns: list[str | int] = ["image", "question", "answer", "chosen" if pairs else "truth"]
            run.log({"samples": wandb.Table(columns=columns, data=data)}, step=step)

        self.run.put(show)

    def finish(
        self,
        summary: dict[str, Any],
        samples: "list[Sample]",
        exit_code: int = 0,
        completions: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Send the result: the summary with flat keys, and a table of images with the answers before and after.

        Args:
            completions: of completions.jsonl, by step: a table of the answers that the model was trained on.
        """
        if self.run:
            self.run.put(lambda run: log_results(run, summary, samples, exit_code, completions))
            self.run.close()


def log_results(
    run: "Run",
    summary: dict[str, Any],
    samples: "list[Sample]",
    exit_code: int,
    completions: Sequence[dict[str, Any]] = (),
) -> None:
    import wandb

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
    checks = summary.get("checks", [])
    run.summary.update(flat | {f"checks/{check['id']}": check["verdict"] for check in checks})
    if checks:
        run.log({"checks": wandb.Table(columns=list(checks[0]), data=[list(check.values()) for check in checks])})
    if samples:
        references = [name.lower() for name in samples[0].references]  # chosen and rejected, or truth
        columns: list[str | int] = ["image", "question", *map(str.lower, samples[0].answers), *references]
        rows = [[wandb.Image(s.image), s.question, *s.answers.values(), *s.references.values()] for s in samples]
        run.log({"answers": wandb.Table(columns=columns, data=rows)})
    if completions:
        names, data = completions_table(completions)
        run.log({"completions": wandb.Table(columns=names, data=data)})
    run.finish(exit_code=exit_code)


def run_id(folder: Path) -> str:
    """The run's id at W&B: a resumed run keeps the one it had."""
    path = folder / "wandb" / "id.json"
    if not (id := read_json(path).get("id")):
        id = secrets.token_hex(4)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"id": id})
    return str(id)


def init_run(config: TrackerConfig, folder: Path, options: dict[str, Any]) -> "Run":
    """Online where there is an account and W&B answers, else offline; both in the run's folder."""
    import wandb

    init = partial(
        wandb.init,
        project=config.project or os.environ.get("WANDB_PROJECT") or PROJECT,
        entity=config.entity,
        dir=folder,
        resume="allow" if "id" in options else None,
        reinit="finish_previous",
        settings=wandb.Settings(
            silent=True, show_warnings=False, init_timeout=INIT_TIMEOUT, login_timeout=INIT_TIMEOUT
        ),
        **options,
    )
    if has_account():
        try:
            if not server_reachable():
                raise OSError("its server cannot be reached")
            return init(mode="online")
        except (Exception, SystemExit) as error:  # it ends the program where it cannot log in
            log.warning(f"W&B: offline ({first_line(error)})")
            wandb.teardown()  # else its service keeps the run that failed to start
    return init(mode="offline")


def has_account() -> bool:
    """Whether W&B finds a key, without asking for one and without the network."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(server().hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def server() -> SplitResult:
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def server_reachable() -> bool:
    """Whether W&B's server takes a connection; its own client tries for minutes."""
    address = server()
    port = address.port or (443 if address.scheme == "https" else 80)
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return True  # only the proxy can tell
    with contextlib.suppress(OSError), socket.create_connection((address.hostname or "", port), timeout=5):
        return True
    return False


def log_upload_hint(run: "Run", *folders: Path) -> None:
    """Say that the run went online, or how to upload these folders (or patterns for them)."""
    paths = " ".join(str(relative_to_cwd(folder)) for folder in folders)
    log.info(f"W&B: offline. To upload: wandb login && wandb sync {paths}" if run.offline else "W&B: online")


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
    if not is_tracked(config) or not rows:
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
        log_upload_hint(run, folder / "wandb" / "offline-run-*", *others)

    options = {"name": "table", "group": group, "job_type": kind, "tags": config.tags}
    table = BackgroundRun(config, folder, options)
    table.put(send_table)
    table.close()
