"""Which trackers a run has, and what they would refuse."""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from urllib.parse import urlsplit

from smolvlm_exp.utils.errors import RequestError, suggestion

MAX_TAG = 64  # letters
MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
PROJECT = "smolvlm_exp"
TRACKERS = ("wandb", "tensorboard", "trackio")  # a package, a module here, and an option of conf/tracker, each


@dataclass
class TrackerConfig:
    """Of several at once, as `tracker=[wandb,tensorboard]`."""

    wandb: bool = False
    tensorboard: bool = False  # event files in the run folder: tensorboard --logdir outputs
    trackio: bool = False  # on this machine: trackio show
    project: str | None = None  # null: WANDB_PROJECT, or smolvlm_exp
    entity: str | None = None  # W&B's; null: WANDB_ENTITY, or the account's own
    tags: list[str] = field(default_factory=list)  # W&B's

    @property
    def chosen(self) -> list[str]:
        """With WANDB_MODE=disabled, W&B is not."""
        disabled = os.environ.get("WANDB_MODE") == "disabled"
        return [name for name in TRACKERS if getattr(self, name) and not (name == "wandb" and disabled)]

    @property
    def project_name(self) -> str:
        return self.project or os.environ.get("WANDB_PROJECT") or PROJECT


def check_installed(config: TrackerConfig) -> None:
    """RequestError where a tracker is not."""
    missing = next((name for name in config.chosen if find_spec(name) is None), None)
    if missing:
        raise RequestError(f"tracker={missing} needs a package that is not installed: pip install {missing}")


def check_tracker(config: TrackerConfig) -> None:
    """
    Raises:
        RequestError: a tracker would refuse a name, a tag or its mode, which it would do in the background, after the
            start, and the run would go untracked. The rules are W&B's.
    """
    if not config.chosen:
        return
    for name, project in (("tracker.project", config.project), ("WANDB_PROJECT", os.environ.get("WANDB_PROJECT"))):
        if project and (len(project) > 128 or set(project) & set("/\\#?%:")):
            raise RequestError(f"{name}={project}: at most 128 letters, and none of / \\ # ? % :")
    if "" in (config.project, config.entity):
        raise RequestError("tracker.project and tracker.entity: leave them out, or give them a name.")
    wrong = next((tag for tag in config.tags if not 1 <= len(tag) <= MAX_TAG), None)
    if wrong is not None:
        raise RequestError(f"tracker.tags: {wrong[:MAX_TAG]!r} has {len(wrong)} letters, and W&B takes 1 to {MAX_TAG}.")
    address = os.environ.get("WANDB_BASE_URL")
    if address and not is_address(address):
        raise RequestError(f"WANDB_BASE_URL={address}: it is no address. Write it as https://HOST.")
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in MODES:
        raise RequestError(f"WANDB_MODE={mode}: {suggestion(mode, list(MODES))}")


def is_address(text: str) -> bool:
    """Whether it is a server's: http://HOST or https://HOST, with a port or not."""
    try:
        address = urlsplit(text)
        return address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:
        return False
