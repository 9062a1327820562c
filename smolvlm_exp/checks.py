"""A check on a run: what was found, what it should be, and a plain verdict."""

from dataclasses import dataclass

# Names of checks on which there is advice.
FALL = "fall of chosen answers' log-probability, nats a token"
SIGHT_LEFT = "share of it that is left after tuning"


@dataclass(frozen=True)
class Check:
    """As summary.json has it."""

    name: str
    value: float
    threshold: str
    verdict: str  # ok, warn or fail
    detail: str = ""  # what is behind a verdict other than ok


def at_least(name: str, value: float, bound: float, otherwise: str = "fail", detail: str = "") -> Check:
    return judged(name, value, f">= {bound:g}", value >= bound, otherwise, detail)


def at_most(name: str, value: float, bound: float, otherwise: str = "fail", detail: str = "") -> Check:
    return judged(name, value, f"<= {bound:g}", value <= bound, otherwise, detail)


def above(name: str, value: float, bound: float, otherwise: str = "fail", detail: str = "") -> Check:
    return judged(name, value, f"> {bound:g}", value > bound, otherwise, detail)


def judged(name: str, value: float, threshold: str, good: bool, otherwise: str, detail: str) -> Check:
    return Check(name, float(value), threshold, "ok" if good else otherwise, "" if good else detail)
