"""settings.md and settings.schema.json, from the dataclasses and the comments of their fields.

python docs/settings.py            # writes both
python docs/settings.py --check    # as `make lint` does: fails where one is not current
"""

import json
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import Field, is_dataclass
from pathlib import Path
from typing import Any

from smolvlm_exp.config.describe import default_text, properties, type_text
from smolvlm_exp.config.schema import SELECTORS, Config, groups

DOCS = Path(__file__).parent
JSON_TYPES: dict[Any, str] = {
    int: "integer", float: "number", str: "string", bool: "boolean", list: "array", dict: "object",
    types.NoneType: "null",
}  # fmt: skip
INTRODUCTION = """\
Written by `python docs/settings.py`. Files in `conf/` may choose other defaults; `--cfg job`
shows what holds.

Your own defaults (a cache, W&B's entity, a launcher) go into `conf/local/default.yaml`, which git ignores:

```yaml
# @package _global_
tracker:
  entity: my_team
```

`docs/settings.schema.json` is the same for editors; in a YAML file:
`# yaml-language-server: $schema=../../docs/settings.schema.json`."""


def tables() -> Iterator[tuple[str, type]]:
    """(heading, dataclass) of every group, with one table for each option that has settings of its own."""
    for group, option, kind in groups():
        if isinstance(kind, type) and is_dataclass(kind):
            yield f"{group}={option}" if option else group, kind


def markdown() -> str:
    """The page."""
    lines = ["# Settings", "", INTRODUCTION, ""]
    seen: set[tuple[str, str, str]] = set()  # of an option, only what the group's other options do not have is listed
    sections = [("general", [row for row in properties(Config) if "." not in row[0] and row[0] not in SELECTORS])]
    sections += [(heading, list(properties(cls, f"{heading.partition('=')[0]}."))) for heading, cls in tables()]
    for heading, rows in sections:
        entries = {(key, default_text(setting), text): (setting, kind) for key, setting, kind, text in rows}
        new = {entry: types for entry, types in entries.items() if entry not in seen}
        seen |= entries.keys()
        if new:
            lines += [f"## {heading}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
            for (key, default, text), (setting, kind) in new.items():
                cells = (f"`{key}`", type_text(setting, kind), f"`{default}`", text)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            lines.append("")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """For editors: which keys a group's YAML file, or an experiment, may have."""
    root: dict[str, Any] = {
        "type": "object",
        "properties": {"defaults": {"type": "array"}, "hydra": {"type": "object"}},
    }
    for heading, cls in [("", Config), *tables()]:
        prefix = f"{heading.partition('=')[0]}." if heading else ""
        for key, setting, kind, text in properties(cls, prefix):
            node = root
            *groups, name = key.split(".")
            for group in groups:
                node = node["properties"].setdefault(group, {"type": "object", "properties": {}})
            if key not in SELECTORS:
                node["properties"][name] = json_property(setting, kind, text)
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "smolvlm_exp", **root}


def json_property(setting: Field[Any], kind: Any, text: str) -> dict[str, Any]:
    if kind is Any:
        return {"description": text}
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    names = [JSON_TYPES.get(typing.get_origin(part) or part, "string") for part in parts]
    described: dict[str, Any] = {"type": names[0] if len(names) == 1 else names, "description": text}
    if "choices" in setting.metadata and names[0] != "array":
        described["enum"] = list(setting.metadata["choices"])
    return described


def files() -> dict[Path, str]:
    schema = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    return {DOCS / "settings.md": markdown(), DOCS / "settings.schema.json": schema}


if __name__ == "__main__":
    for path, text in files().items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{path.name} is not current: python docs/settings.py writes it")
