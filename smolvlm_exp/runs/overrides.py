"""Settings by full name: Hydra overrides as text (key=value), nested dictionaries made flat."""

from typing import Any


def given_value(args: Any, key: str, otherwise: str) -> str:
    """A key's value on a command line."""
    return next((o.partition("=")[2] for o in args.overrides if o.startswith(f"{key}=")), otherwise)


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": {}} -> {"a.b": 1, "c": {}}"""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {
        k: v for key, value in tree.items() for k, v in flatten(value, f"{path}.{key}" if path else str(key)).items()
    }
