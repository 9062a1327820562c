"""Hydra overrides as text: key=value."""

from typing import Any


def given_value(args: Any, key: str, otherwise: str) -> str:
    """A key's value on a command line."""
    return next((o.partition("=")[2] for o in args.overrides if o.startswith(f"{key}=")), otherwise)


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
