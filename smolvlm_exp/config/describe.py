"""What each setting is, by the dataclasses and the comments of their fields: docs/settings.md and `--help GROUP`."""

import ast
import inspect
import json
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from smolvlm_exp.config.schema import Config, dataclass_of, settings
from smolvlm_exp.utils.errors import RequestError, suggestion
from smolvlm_exp.utils.paths import CONF

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


def group_help(group: str, config: Config) -> str:
    """The options of a group, and its settings with meaning and value.

    Args:
        group: or `general`, for what belongs to none.
        config: with the values that a command without further settings has.

    Raises:
        RequestError: there is no such group.
    """
    values = {key: value for key, _, value in settings(config)}
    names = list(dict.fromkeys(key.partition(".")[0] for key in values if "." in key))
    if group not in (*names, "general"):
        raise RequestError(f"--help {group}: no such group. {suggestion(group, ['general', *names])}")
    cls = Config if group == "general" else type(getattr(config, group))
    prefix = "" if group == "general" else f"{group}."
    rows = [row for row in properties(cls, prefix) if group != "general" or ("." not in row[0] and row[0] in values)]
    width = shutil.get_terminal_size((100, 0)).columns
    options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    lines = [f"{group}={' '.join(options)}", ""] if options else []
    for key, setting, kind, meaning in rows:
        choices = setting.metadata.get("choices")
        kinds = f"one of {type_text(setting, kind)}" if choices else type_text(setting, kind)
        lines.append(f"{key}={json.dumps(values[key])}   ({kinds})".replace("`", ""))
        lines += textwrap.wrap(meaning, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([*lines, "", "All settings: docs/settings.md. Values with your other choices: --cfg job."])
