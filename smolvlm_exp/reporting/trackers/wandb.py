"""Weights & Biases: online where there is an account, offline otherwise; it never prompts."""

import contextlib
import json
import logging
import netrc
import os
import secrets
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.truth import truth_text
from smolvlm_exp.reporting.html import SMALL_EDGE
from smolvlm_exp.reporting.sampled_answers import completions_table
from smolvlm_exp.reporting.trackers import background
from smolvlm_exp.reporting.trackers.background import BackgroundRun
from smolvlm_exp.reporting.trackers.base import Client, Outcome, TrackedRun
from smolvlm_exp.reporting.trackers.config import MAX_TAG, TrackerConfig
from smolvlm_exp.utils.errors import first_line
from smolvlm_exp.utils.files import read_json, write_json
from smolvlm_exp.utils.paths import relative_to_cwd

if TYPE_CHECKING:
    from wandb import Artifact, Run

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30.0  # seconds
MAX_NAME = 128  # letters
BEST = {  # metrics whose best value, not only the last one, is shown and sorted by
    "eval/loss": "min", "eval/rewards/accuracies": "max", "eval/rewards/margins": "max", "eval/reward": "max",
    "train/reward": "max",
}  # fmt: skip


def start(config: TrackerConfig, run: TrackedRun) -> "WandbRun":
    options = {
        "id": run_id(run.folder),
        "name": run.name[-MAX_NAME:],
        "group": run.group,
        "job_type": run.kind,
        "tags": list(dict.fromkeys([*config.tags, *(tag[:MAX_TAG] for tag in run.tags)])),
        "config": dict(run.settings),
    }
    opened = init_run(config, run.folder, options)
    if not run.in_sweep:
        log_upload_hint(opened, Path(opened.dir).parent)
    for metric, best in BEST.items():
        opened.define_metric(metric, summary=f"{best},last")
    return WandbRun(opened, run.folder)


class WandbRun(Client):
    def __init__(self, run: "Run", folder: Path) -> None:
        self.run, self.folder = run, folder

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def show_samples(self, rows: list[dict[str, Any]], answers: list[str], step: int) -> None:
        import wandb

        data, pairs = [], "chosen" in rows[0]
        for row, answer in zip(rows, answers, strict=True):
            image = row["images"][0].copy()
            image.thumbnail((SMALL_EDGE, SMALL_EDGE))  # because the table is uploaded many times
            known = text_of(row["chosen"]) if pairs else truth_text(row["truth"])
            data.append([wandb.Image(image), text_of(row["prompt"]), answer, known])
        columns: list[str | int] = ["image", "question", "answer", "chosen" if pairs else "truth"]
        self.run.log({"samples": wandb.Table(columns=columns, data=data)}, step=step)

    def finish(self, outcome: Outcome) -> None:
        """The summary with flat keys; tables of checks, and of images with the answers before and after; artifacts."""
        import wandb

        run, samples = self.run, outcome.samples
        run.summary.update(outcome.values)
        if checks := outcome.summary.get("checks"):
            run.log({"checks": wandb.Table(columns=list(checks[0]), data=[list(check.values()) for check in checks])})
        if samples:
            references = [name.lower() for name in samples[0].references]  # chosen and rejected, or truth
            columns: list[str | int] = ["image", "question", *map(str.lower, samples[0].answers), *references]
            rows = [[wandb.Image(s.image), s.question, *s.answers.values(), *s.references.values()] for s in samples]
            run.log({"answers": wandb.Table(columns=columns, data=rows)})
        if outcome.completions:
            names, data = completions_table(outcome.completions)
            run.log({"completions": wandb.Table(columns=names, data=data)})
        if outcome.summary.get("status") == "done":
            self.log_lineage(outcome.summary)
        finish(run, outcome.exit_code)

    def log_lineage(self, summary: dict[str, Any]) -> None:
        """The rows as an artifact that this run used; its adapter and its report as artifacts that it made."""
        import wandb

        source = summary["sources"]["data"]
        name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in source["id"])
        used = wandb.Artifact(name[-MAX_NAME:], type="dataset", metadata=source)
        with used.new_file("data.json") as file:
            json.dump({"source": source, "rows": summary.get("data"), "digest": summary.get("data_digest")}, file)
        # As `run.use_artifact` does, which refuses offline runs, though their file holds it and the upload reads it.
        self.run._log_artifact(used, aliases=[], is_user_created=True, use_after_commit=True)
        metadata = {"base": summary["sources"]["model"], "after": summary["after"], "seed": summary["seed"]}
        for name, kind in (("adapter", "model"), ("report.html", "report")):
            files = self.folder / name
            if files.exists():
                made = wandb.Artifact(f"{files.stem}-{self.run.id}", type=kind, metadata=metadata)
                add_files(made, *(sorted(files.iterdir()) if files.is_dir() else [files]))
                self.run.log_artifact(made)


def add_files(artifact: "Artifact", *paths: Path) -> None:
    """Where they lie: W&B would copy each."""
    for path in paths:
        artifact.add_file(str(path), policy="immutable")


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
    # Its own telemetry, for which Python's end waits 20 s where the server hangs.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    os.environ["WANDB_DATA_DIR"] = str((folder / "wandb").absolute())  # of images, until they are uploaded
    os.environ.pop("WANDB_SERVICE", None)  # of the process that started this one, with which it would end
    init = partial(
        wandb.init,
        project=config.project_name,
        entity=config.entity,
        dir=folder,
        resume="allow" if "id" in options else None,
        reinit="finish_previous",
        settings=wandb.Settings(
            silent=True,
            show_warnings=False,
            init_timeout=INIT_TIMEOUT,
            login_timeout=INIT_TIMEOUT,
            finish_timeout=background.PATIENCE,  # also where Python's end finishes a run that failed here
        ),
        **options,
    )
    if has_account():
        try:
            if not server_reachable():
                raise OSError("its server cannot be reached")
            return init(mode="online")
        except BaseException as error:  # it ends the program where it cannot log in
            log.warning(f"W&B: offline ({first_line(error)})")
            wandb.teardown()  # else its service keeps the run that failed to start
    try:
        return init(mode="offline")
    except OSError:
        with contextlib.suppress(OSError):
            wandb.teardown()  # a service that is gone, of an earlier run of this process
        return init(mode="offline")


def finish(run: "Run", exit_code: int = 0) -> None:
    """End a run and W&B's service, which writes the last of the run's file only after `run.finish`.

    W&B would end it when Python exits, which `multiprocessing` does not wait for.
    """
    import wandb

    run.finish(exit_code=exit_code)
    wandb.teardown()


def has_account() -> bool:
    """Whether W&B finds a key, without asking for one and without the network."""
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(server().hostname or "") is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # ValueError: it is not UTF-8
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
    if "wandb" not in config.chosen or not rows:
        return

    def send_table(run: "Run") -> None:
        import wandb

        values: list[list[Any]] = [list(row.values()) for row in rows]
        run.log({kind: wandb.Table(columns=list(rows[0]), data=values, allow_mixed_types=True)})
        artifact = wandb.Artifact(group.replace(" ", "-"), type=kind)
        add_files(artifact, *(folder / f"{kind}.{ending}" for ending in ("csv", "html")))
        run.log_artifact(artifact)
        run.summary.update(numbers)
        finish(run)
        log_upload_hint(run, folder / "wandb" / "offline-run-*", *others)

    options = {"name": f"{group} table", "group": group, "job_type": kind, "tags": config.tags}
    table = BackgroundRun("wandb", folder, partial(init_run, config, folder, options))
    table.put(send_table)
    table.close()
