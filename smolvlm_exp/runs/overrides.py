"""Settings by full name: Hydra overrides as text (key=value), nested dictionaries flattened."""

from collections.abc import Iterable
from typing import Any


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def as_settings(overrides: Iterable[str]) -> dict[str, str]:
    """Key -> value as typed."""
    return {key_of(override): override.partition("=")[2] for override in overrides}


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": {}} -> {"a.b": 1, "c": {}}"""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {
        k: v for key, value in tree.items() for k, v in flatten(value, f"{path}.{key}" if path else str(key)).items()
    }
