"""What a session has read: keys and values of token sequences, and features of images, within a budget of bytes."""

from bisect import bisect, insort
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from smolvlm_exp.engine.generation.continuous import Past


class LRUCache:
    """Tuples of tensors or arrays; the least recently used are dropped once all take more than `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self.entries: OrderedDict[Any, tuple[Any, ...]] = OrderedDict()

    def put(self, key: Any, entry: tuple[Any, ...]) -> None:
        if key in self.entries:
            self.pop(key)
        self.entries[key] = entry
        self.bytes += size(entry)
        while self.bytes > self.budget:
            self.pop(next(iter(self.entries)))

    def get(self, key: Any) -> tuple[Any, ...]:
        self.entries.move_to_end(key)
        return self.entries[key]

    def pop(self, key: Any) -> tuple[Any, ...]:
        entry = self.entries.pop(key)
        self.bytes -= size(entry)
        return entry


def size(entry: tuple[Any, ...]) -> int:
    return sum(array.nbytes for array in entry)


class SessionCache(LRUCache):
    """Keys are ("image", identity, the image's key) and ("tokens", identity, the tokens' keys).

    `identity` says which adapters were active.
    """

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self.sequences: list[tuple[Any, ...]] = []  # the keys of token sequences, sorted

    def put(self, key: Any, entry: tuple[Any, ...]) -> None:
        if key in self.entries:
            self.pop(key)
        if key[0] == "tokens":
            insort(self.sequences, key)
        super().put(key, entry)

    def pop(self, key: Any) -> tuple[Any, ...]:
        if key[0] == "tokens":
            del self.sequences[bisect(self.sequences, key) - 1]
        return super().pop(key)

    def take_prefix(self, identity: str | None, keys: Sequence[int]) -> Past:
        """Keys and values of the longest prefix of `keys` that was read.

        An entry that is a prefix as a whole is taken out: the longer one that grows from it takes its place.
        """
        wanted = ("tokens", identity, tuple(keys))
        place = bisect(self.sequences, wanted)
        # Of sorted sequences a neighbour shares the longest prefix.
        near = [entry for entry in self.sequences[max(0, place - 1) : place + 1] if entry[:2] == wanted[:2]]
        lengths = {entry: shared_prefix(keys, entry[2]) for entry in near}
        if not any(lengths.values()):
            return ()
        best = max(lengths, key=lengths.__getitem__)
        past = self.pop(best) if lengths[best] == len(best[2]) else self.get(best)
        return tuple(array[:, :, : lengths[best]] for array in past)


def shared_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences have in common from the start."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
