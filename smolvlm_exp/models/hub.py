"""Whether the Hub answers, within seconds: upstream tries every file six times first, 23 s each."""

import logging
import threading
from functools import cache

log = logging.getLogger(__name__)

TIMEOUT = 10.0  # seconds for an answer, before local files have to do


def ping(seconds: float) -> str:
    """The outcome of one HEAD request by the client that downloads: `HTTP 200`, or what went wrong.

    In a thread, because name resolution has no timeout.
    """
    from huggingface_hub import constants, get_session

    answers: list[str] = []

    def ask() -> None:
        try:
            reply = get_session().head(constants.ENDPOINT, timeout=seconds, follow_redirects=True)
            answers.append(f"HTTP {reply.status_code}")
        except Exception as error:  # its type alone: a proxy's address may hold a password
            answers.append(type(error).__name__)

    (thread := threading.Thread(target=ask, daemon=True)).start()
    thread.join(seconds + 0.5)
    return answers[0] if answers else f"no answer in {seconds:g} s"


@cache
def is_offline() -> bool:
    """Asked and logged once; any HTTP status means that the Hub is there."""
    outcome = ping(TIMEOUT)
    offline = not outcome.startswith("HTTP")
    if offline:
        log.warning(f"hub: {outcome}; using local files only")
    return offline
