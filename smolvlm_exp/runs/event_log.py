"""metrics.jsonl and samples.jsonl: a JSON object a line, written and read so that a kill spoils none but the last."""

import json
import os
from pathlib import Path
from typing import Any

from smolvlm_exp.utils.files import json_lines
from smolvlm_exp.utils.formatting import as_finite, as_float


def read_events(path: Path) -> list[dict[str, Any]]:
    """The log events by step. A line cut short, as a killed run leaves it, is passed over."""
    if not path.is_file():
        return []
    events = []
    for _, line in json_lines(path.read_text(encoding="utf-8", errors="replace")):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and as_finite(event.get("step")) is not None:
            events.append(event)
    return sorted(events, key=lambda e: e["step"])


def metric_points(events: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """A key's points; where a resumed run logged a step again, the later one counts."""
    at = {float(e["step"]): value for e in events if (value := as_float(e.get(key))) is not None}
    return list(at.items())


def append_event(path: Path, event: dict[str, Any]) -> None:
    """A line more of JSON. Half a line at the end, as a kill leaves it, does not spoil the next."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(event, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())  # a checkpoint that is there never knows more than this file


def truncate_after(path: Path, step: int) -> None:
    """Take away what was logged after `step`, which is done again now, and the half line that a kill left.

    At step 0 that is all: a run that was killed before its first checkpoint may have logged already.
    """
    if not path.exists():
        return
    kept = []
    for _, line in json_lines(path.read_text(encoding="utf-8")):
        try:
            if json.loads(line)["step"] <= step and step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)
