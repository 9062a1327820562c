"""settings.md and settings.schema.json, from the dataclasses and the comments of their fields.

python docs/settings.py            # writes both
python docs/settings.py --check    # as `make lint` does: fails where one is not current
"""

import ast
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from smolvlm_exp.config.schema import SELECTORS, Config, dataclass_of, groups

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
COMMENT = re.compile(r"#\s(?!type:|noqa|fmt:)([^#]*(?:#\s(?!type:|noqa|fmt:)[^#]*)?)$")


def comments(cls: type) -> dict[str, str]:
    """Field -> the comment on its line."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    meanings = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            comment = COMMENT.search(lines[(node.end_lineno or node.lineno) - 1])
            meanings[node.target.id] = comment[1].strip() if comment else ""
    return meanings


def properties(cls: type, path: str = "") -> Iterator[tuple[str, Field[Any], Any, str]]:
    """(full name, dataclass field, type, meaning) of every setting of a dataclass."""
    hints = typing.get_type_hints(cls)
    meaning: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        meaning |= comments(base)
    for setting in fields(cls):
        kind = hints[setting.name]
        if group := dataclass_of(kind):
            yield from properties(group, f"{path}{setting.name}.")
        else:
            yield f"{path}{setting.name}", setting, kind, meaning[setting.name]


def tables() -> Iterator[tuple[str, type]]:
    """(heading, dataclass) of every group, with one table for each option that has settings of its own."""
    for group, option, kind in groups():
        if isinstance(kind, type) and is_dataclass(kind):
            yield f"{group}={option}" if option else group, kind


def default_text(setting: Field[Any]) -> str:
    if setting.default_factory is not MISSING:
        return json.dumps(setting.default_factory())
    return "required" if setting.default in (MISSING, "???") else json.dumps(setting.default)


def type_text(setting: Field[Any], kind: Any) -> str:
    choices = setting.metadata.get("choices")
    if choices:
        return " ".join(f"`{'null' if choice is None else choice}`" for choice in choices)
    name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    return name.replace("None", "null")


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
