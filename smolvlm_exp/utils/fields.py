"""Dataclass fields with the values they take, so that a wrong one is refused before any work starts."""

from dataclasses import field
from typing import Any


def one_of(default: str | None, *others: str) -> Any:
    """A setting with a closed list of values."""
    return field(default=default, metadata={"choices": (default, *others)})


def some_of(default: str, *others: str) -> Any:
    """A list of values, each out of a closed list."""
    return field(default_factory=lambda: [default], metadata={"choices": (default, *others)})


def at_least(low: float, default: Any) -> Any:
    """A number from `low` upwards."""
    return field(default=default, metadata={"low": low})


def above(low: float, default: Any) -> Any:
    """A number greater than `low`."""
    return field(default=default, metadata={"above": low})
