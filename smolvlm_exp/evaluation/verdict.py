"""What the held-out rows allow to say of a run: words that the terminal, the reports and sweeps share."""

from collections.abc import Iterable
from typing import Any

from smolvlm_exp.evaluation.metrics import metric_of

MIN_ROWS = 20  # held-out rows, below which nothing is concluded


def too_few(rows: int | None) -> str:
    """`8 held-out rows: too few to tell`; empty where there are enough, or their number is not known."""
    return f"{rows} held-out rows: too few to tell" if rows is not None and rows < MIN_ROWS else ""


def rows_changed(summaries: Iterable[dict[str, Any]], keys: Iterable[str]) -> str:
    """Runs whose data are the same by their settings, and were not; `keys`: the settings that differ between them."""
    if any(key.partition(".")[0] == "data" for key in keys):
        return ""
    digests = {str(digest) for summary in summaries if (digest := summary.get("data_digest"))}
    return "the training rows changed between these runs, so settings do not explain them" if len(digests) > 1 else ""


def verdict(summary: dict[str, Any], keys: Iterable[str]) -> str:
    """`too_few`, or `no gain over before` where none of these metrics changed for the better by more than chance.

    Args:
        summary: what summary.json holds; keys: of `changes`.
    """
    changes = summary.get("changes", {})
    gains = [
        min(changes[key]["low"] * good, changes[key]["high"] * good) > 0
        for key in keys
        if key in changes and (good := metric_of(key).good)
    ]
    return too_few(summary.get("held_out_rows")) or ("no gain over before" if gains and not any(gains) else "")
