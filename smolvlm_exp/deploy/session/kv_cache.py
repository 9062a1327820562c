"""Keys and values of tokens that were read, as either backend has them, and the cache that keeps them between turns."""

from collections import OrderedDict
from typing import Any

Past = tuple[Any, ...]  # key, value, key, value, ... of each layer: tensors or arrays (batch, kv heads, tokens, size)


def past_length(past: Past) -> int:
    """Tokens."""
    return past[0].shape[2] if past else 0


def truncate(past: Past, length: int) -> Past:
    """Its first `length` tokens."""
    return tuple(array[:, :, :length] for array in past) if length else ()


class LRUCache:
    """Tuples of tensors or arrays by key; those used longest ago are dropped once all take more than `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.entries: OrderedDict[tuple[Any, ...], tuple[Any, ...]] = OrderedDict()

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for entry in self.entries.values() for array in entry)

    def put(self, key: tuple[Any, ...], entry: tuple[Any, ...]) -> None:
        self.entries[key] = entry
        self.entries.move_to_end(key)
        while self.bytes > self.budget:
            self.entries.popitem(last=False)

    def get(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        """The entry, which is then the newest; empty where there is none."""
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key, ())
