"""Whether the hub answers, found out within seconds: upstream tries every file six times first, 23 s each."""

import logging
import threading
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)


SECONDS = 10.0  # for an answer, before what is on this disk has to do


def ping(seconds: float) -> str:
    """What one HEAD request by the client that downloads comes to: `HTTP 200`, or what went wrong.

    In a thread, because looking a name up knows no time limit.
    """
    from huggingface_hub import constants, get_session

    answers: list[str] = []

    def ask() -> None:
        try:
            reply = get_session().head(constants.ENDPOINT, timeout=seconds, follow_redirects=True)
            answers.append(f"HTTP {reply.status_code}")
        except Exception as error:  # only its kind is told: a proxy's address may hold a password
            answers.append(type(error).__name__)

    (thread := threading.Thread(target=ask, daemon=True)).start()
    thread.join(seconds + 0.5)
    return answers[0] if answers else f"no answer in {seconds:g} s"


def must_load_locally(name: str) -> bool:
    """Whether a model's files have to be on this disk: it is no folder, and the hub does not answer."""
    return not Path(name).is_dir() and is_offline()


@cache
def is_offline() -> bool:
    """Asked and told once; whatever status the hub answers with, it is there."""
    found = ping(SECONDS)
    away = not found.startswith("HTTP")
    if away:
        log.warning(f"hub: {found}; models are taken from this disk")
    return away
