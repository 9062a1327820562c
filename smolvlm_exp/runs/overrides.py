"""Settings by full name: Hydra overrides as text (key=value), nested dictionaries flattened."""

import re
from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

PLAIN = re.compile(r"/?[A-Za-z_][\w./+-]*", re.ASCII)  # texts that need no quotes, but for `WORDS`
WORDS = ("null", "true", "false", "nan", "inf")


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def as_settings(overrides: Iterable[str]) -> dict[str, str]:
    """Key -> value as typed, a single text without its quotes."""
    return {key_of(override): unquoted(override.partition("=")[2]) for override in overrides}


def as_override(key: str, text: str) -> str:
    """The override by which Hydra reads `text`, whatever is in it."""
    return f"{key}={quoted(text)}"


def quoted(text: str) -> str:
    """A text with the quotes that Hydra wants around most characters."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    return QuotedString(text, Quote.single if '"' in text else Quote.double).with_quotes()


def unquoted(value: str) -> str:
    if value[:1] not in ("'", '"'):
        return value
    try:
        override = OverridesParser.create().parse_rule(f"key={value}", "override")
    except HydraException:
        return value
    return value if override.is_sweep_override() else str(override.value())


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": {}} -> {"a.b": 1, "c": {}}"""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {
        k: v for key, value in tree.items() for k, v in flatten(value, f"{path}.{key}" if path else str(key)).items()
    }
