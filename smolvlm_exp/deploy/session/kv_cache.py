"""What is kept between turns: newest first, and no more bytes than allowed."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any


class LRUCache:
    """A dictionary that forgets what was used longest ago, once it holds more than `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self.entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def put(self, key: Hashable, value: Any, size: int) -> None:
        self.drop(key)
        self.entries[key] = value, size
        self.bytes += size
        while self.bytes > self.budget:
            self.drop(next(iter(self.entries)))

    def get(self, key: Hashable) -> Any:
        """The value, which is then the newest; None where there is none."""
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][0]

    def drop(self, key: Hashable) -> None:
        if key in self.entries:
            self.bytes -= self.entries.pop(key)[1]

    def items(self) -> Iterator[tuple[Hashable, Any]]:
        return iter([(key, value) for key, (value, _) in self.entries.items()])
