"""A check on a run: what was found, what it should be, and a plain verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

BOTH = "held-out rows that are training rows too"
# Names of checks on which there is advice.
FALL = "fall of chosen answers' log-probability, nats a token"
SIGHT_LEFT = "share of it that is left after tuning"

USUAL = 8  # losses before one can stand out
SPIKE = 10.0  # median deviations over the median


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


def spike(losses: Sequence[float]) -> float | None:
    """What is usual, the median, where the last loss lies far above the others; None where it does not."""
    before = [loss for loss in losses[:-1] if math.isfinite(loss)][-50:]
    if len(before) < USUAL or not math.isfinite(losses[-1]):
        return None
    usual = median(before)
    spread = median(abs(loss - usual) for loss in before)
    return usual if losses[-1] > max(usual + SPIKE * spread, 1.5 * usual) else None
