"""Overrides as a person types them: what Hydra cannot read, or reads as another kind of value, and how to type it."""

import os
import re
import shlex
from types import UnionType
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from smolvlm_exp.runs.overrides import as_override, quoted
from smolvlm_exp.utils.errors import RequestError

KEY = re.compile(r"(\+{1,2}|~)?[\w$][\w$@/.:-]*", re.ASCII)


def parsed(overrides: list[str]) -> list[Override]:
    """RequestError where Hydra cannot read one."""
    parser = OverridesParser.create()
    try:
        read: list[Override] = parser.parse_overrides(overrides)
    except HydraException as error:
        raise RequestError(spaced(overrides) or unreadable(getattr(error, "override", ""))) from error
    nameless = next((override.input_line for override in read if not override.key_or_group), None)
    if nameless:
        raise RequestError(unreadable(nameless))
    return read


def spaced(words: list[str]) -> str:
    """The error message for `key = value`, which a shell hands over as three words; empty where there is none such."""
    for i, word in enumerate(words):
        after = words[i + 1 : i + 3]
        if re.fullmatch(KEY, word) and after[:1] == ["="] and len(after) == 2:
            fix = f"{word}={after[1]}"
        elif re.fullmatch(KEY, word) and after and (after[0].startswith("=") or "=" not in after[0]):
            fix = f"{word}={after[0].removeprefix('=')}"
        elif word.endswith("=") and after and "=" not in after[0]:
            fix = f"{word}{after[0]}"
        else:
            continue
        return f"{' '.join([word, *after[: 2 if after[0] == '=' else 1]])}: no spaces around the = sign: type {fix}"
    return ""


def unreadable(override: str) -> str:
    if "\r" in override:
        return f"{override.strip()}: it ends like a line of Windows; save the script with Unix line ends (dos2unix)."
    if any("\ud800" <= letter <= "\udfff" for letter in override):
        return f"{override!a}: this terminal's letters are not read as UTF-8: set PYTHONUTF8=1."
    key, equals, value = override.partition("=")
    if equals and value.rstrip(" ").endswith(","):
        return f"{override}: it ends in a comma: type {key}={value.rstrip(', ')}"
    if not equals or key != key.strip():
        return f"{override}: a setting is typed as key=value, without spaces around the = sign."
    if not KEY.fullmatch(key):
        return f"{override}: {key!r} is not the name of a setting."
    if value.startswith("[") and value.endswith("]"):
        items = ",".join(quoted(item.strip()) for item in value[1:-1].split(","))
        return f"{override}: texts with such characters are quoted, so type {shlex.quote(f'{key}=[{items}]')}"
    return f"{override}: a text with such characters is quoted, so type {as_text(key, value)}"


def as_text(key: str, text: str) -> str:
    """How a shell is given a setting whose value is this text. It leaves a ~ behind the = alone, and so does Hydra."""
    return shlex.quote(as_override(key, os.path.expanduser(text)))


def values_of(override: Override) -> list[Any]:
    """Its value, or those that it sweeps over."""
    if not override.is_sweep_override():
        return [override.value()]
    texts = override.sweep_string_iterator() if override.is_choice_sweep() else ()
    return [one.value() for one in parsed([f"{override.key_or_group}={text}" for text in texts])]


def check_kind(override: Override, kind: Any, multirun: bool) -> None:
    """Refuse a list for one text and the reverse, a sweep without -m, and a text that Hydra reads as a number.

    Args:
        kind: the setting's type; None: not known.
    """
    key, value = override.key_or_group, (override.input_line or "").partition("=")[2].strip()
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    is_list, is_text = any(get_origin(each) is list for each in kinds), str in kinds
    items = value.removeprefix("[").removesuffix("]")
    if key == "adapter.target":
        pattern = f".*({items.replace(',', '|').replace(' ', '')})"
        fix = f"type a regular expression over module names, as {as_text(key, pattern)}"
    elif is_list:
        fix = f"type a list, {shlex.quote(f'{key}=[{items}]')}"
    else:
        fix = f"type {as_text(key, value)} if it is one text" if is_text else "give it one value"
    values = values_of(override)
    if override.is_sweep_override() and not multirun:
        raise RequestError(f"{override.input_line}: several values are a sweep: add -m, or {fix}")
    lists = [isinstance(each, list) for each in values if each is not None]
    if (is_text and any(lists)) or (is_list and not all(lists)):
        raise RequestError(f"{override.input_line}: {fix}")
    number = values[0] if len(values) == 1 and not isinstance(values[0], bool) else None
    if is_text and isinstance(number, int | float) and str(number) != value:
        raise RequestError(f"{override.input_line}: it would be read as the number {number}; {fix}")
