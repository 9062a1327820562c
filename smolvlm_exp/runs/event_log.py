"""metrics.jsonl and samples.jsonl: JSON Lines, written and read so that a kill can only spoil the last line."""

import json
import os
from pathlib import Path
from typing import Any

from smolvlm_exp.utils.files import json_lines, without_nan, write_text
from smolvlm_exp.utils.formatting import as_finite, as_float


def read_events(path: Path) -> list[dict[str, Any]]:
    """The log events by step; an incomplete line, as a killed run leaves it, is skipped."""
    if not path.is_file():
        return []
    events = []
    for _, line in json_lines(path.read_text(encoding="utf-8", errors="replace")):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and as_finite(event.get("step")) is not None:
            events.append(event)
    return sorted(events, key=lambda e: e["step"])


def metric_points(events: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """A key's points; where a resumed run logged a step again, the later one counts."""
    at = {float(e["step"]): value for e in events if (value := as_float(e.get(key))) is not None}
    return list(at.items())


def append_event(path: Path, event: dict[str, Any]) -> None:
    """Append a line of JSON; an incomplete last line, as a kill leaves it, does not spoil it."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(without_nan(event), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())  # so that no checkpoint is ahead of this file


def truncate_after(path: Path, step: int) -> None:
    """Remove what was logged after `step`, and an incomplete line; at step 0 everything."""
    if path.exists():
        events = [event for event in read_events(path) if step and event["step"] <= step]
        write_text(path, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events))
