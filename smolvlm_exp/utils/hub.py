"""The Hugging Face Hub: whether it is there, and what its clients' many errors mean."""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from smolvlm_exp.utils.errors import RequestError, first_line, suggestion

log = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
PING_SECONDS = 10.0
KNOWN: dict[Kind, list[str]] = {  # what a misspelt name may have meant
    "model": [
        f"HuggingFaceTB/{name}"
        for name in (
            "SmolVLM-Instruct", "SmolVLM-500M-Instruct", "SmolVLM-256M-Instruct", "SmolVLM2-2.2B-Instruct",
            "SmolVLM2-500M-Video-Instruct", "SmolVLM2-256M-Video-Instruct",
        )
    ],
    "dataset": [
        "HuggingFaceH4/rlaif-v_formatted", "openbmb/RLAIF-V-Dataset", "openbmb/RLHF-V-Dataset", "trl-lib/rlaif-v",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Provenance:
    """Where a model or rows come from."""

    id: str  # on the Hub, a folder, or the name of what ships with this package
    commit: str | None = None  # of the Hub's
    license: str | None = None

    def __str__(self) -> str:
        return f"{self.id}{f' at {self.commit[:8]}' if self.commit else ''} ({self.license or 'licence unknown'})"


def ping(seconds: float) -> str:
    """The outcome of one HEAD request by the client that downloads: `HTTP 200`, or what went wrong.

    In a thread, because name resolution has no timeout.
    """
    from huggingface_hub import constants, get_session

    outcome = f"no answer in {seconds:g} s"

    def request() -> None:
        nonlocal outcome
        try:
            reply = get_session().head(constants.ENDPOINT, timeout=seconds, follow_redirects=True)
            outcome = f"HTTP {reply.status_code}"
        except Exception as error:  # only its type: a proxy's address may hold a password
            outcome = type(error).__name__

    (thread := threading.Thread(target=request, daemon=True)).start()
    thread.join(seconds + 0.5)
    return outcome


@cache
def is_offline() -> bool:
    """Checked and logged once per process: upstream would try each file six times, 23 s each.

    Any HTTP status means that the Hub is there. Where it is not, its clients are told too, so that none of them tries.
    """
    from huggingface_hub import constants

    outcome = ping(PING_SECONDS)
    if outcome.startswith("HTTP"):
        return False
    constants.HF_HUB_OFFLINE = True
    log.warning(f"hub: {outcome}; using local files only")
    return True


def is_hub_id(name: str) -> bool:
    """Whether it has the form OWNER/NAME, and is nothing on this disk."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


@contextmanager
def hub_errors(setting: str, id: str, kind: Kind, revision: str | None = None) -> Iterator[None]:
    """Turns the errors of the Hub's clients into a `RequestError` that names the setting, the cause and the next step.

    Args:
        setting: the one that names `id`, as `model.id`.
    """
    try:
        yield
    except Exception as error:
        problem = hub_problem(error, id, kind, revision)
        if problem is None:
            raise
        raise RequestError(f"{setting}={id}: {problem}") from error


def hub_problem(error: BaseException, id: str, kind: Kind, revision: str | None = None) -> str | None:
    """What an error of the Hub's clients, or one behind it, means; None where it is no such error."""
    from huggingface_hub import errors

    causes: list[BaseException] = []
    behind: BaseException | None = error
    while behind is not None and behind not in causes:
        causes.append(behind)
        behind = behind.__cause__ or behind.__context__
    for cause in causes:
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        if isinstance(cause, errors.GatedRepoError):
            page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{id}"
            return f"it is gated. Accept its conditions at {page}, then log in as that account: hf auth login."
        if isinstance(cause, errors.RepositoryNotFoundError):
            near = "" if id in KNOWN[kind] else suggestion(id, KNOWN[kind]).partition("Known:")[0]
            return (
                f"the Hub has no such {kind}, or it is private and your token does not reach it. {near}"
                "For a private one log in: hf auth login."
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"it has no branch, tag or commit {revision}. Leave out the revision for the newest."
        if status == 401:
            return "the Hub refuses your token. Log in anew, `hf auth login`, or unset HF_TOKEN if it is set."
        if status is not None and not isinstance(cause, errors.EntryNotFoundError):
            return f"the Hub answers HTTP {status} ({first_line(cause)}). Try again later."
    for cause in causes:
        if isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            return "it is not on this disk as a whole, and the Hub cannot be reached. Connect, or give a local folder."
        if isinstance(cause, errors.HfHubHTTPError):
            continue
        if isinstance(cause, errors.HTTPError | errors.XetDownloadError | ConnectionError):
            reason = f"{type(cause).__name__}: {first_line(cause)}"
            return f"the connection to the Hub broke off ({reason}). Try again later."
    return None
