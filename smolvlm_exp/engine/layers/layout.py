"""Where each sequence of a packed batch lies (inputs/packing.py), as attention's kernels want it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch


@dataclass
class Layout:
    """Where each sequence of a packed batch lies: packing.pack's fields of the same names."""

    tokens: int
    middle: int
    cu_first: torch.Tensor
    cu_second: torch.Tensor
    cu_keys: torch.Tensor
    keys_at: torch.Tensor
    max_first: int
    max_second: int
    max_keys: int
    copies: int

    @classmethod
    def of(cls, packed: Mapping[str, Any]) -> "Layout":
        return cls(**{field.name: packed[field.name] for field in fields(cls)})

    @cached_property
    def keys(self) -> int:
        """S, of both halves."""
        return self.middle + len(self.keys_at)

    @cached_property
    def sources(self) -> torch.Tensor:
        """(S,) the token of each key: the first half's in order, then `keys_at`."""
        return torch.cat((torch.arange(self.middle, device=self.keys_at.device), self.keys_at))

    @cached_property
    def slots(self) -> torch.Tensor:
        """(1 + copies, T) int32, a token's places in `sources`, -1 where it has fewer: its own, then the second half's.

        A prompt's tokens are keys of the second half once for each answer but the first.
        """
        keys, order = self.keys_at.sort(stable=True)
        places = torch.arange(len(keys), device=keys.device)
        copy = places - torch.searchsorted(keys, keys)  # which of its token's occurrences a key is
        slots = torch.full((1 + self.copies, self.tokens), -1, dtype=torch.int32, device=keys.device)
        slots[0, : self.middle] = torch.arange(self.middle, device=keys.device)
        slots[1 + copy, keys] = (order + self.middle).int()
        return slots

    @cached_property
    def sequences(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Where B + S sequences begin, (B + S + 1,) int32, in the T tokens and in `sources`; the longest of each."""
        cu_queries = torch.cat((self.cu_first, self.cu_second[1:] + self.middle))
        cu_sources = torch.cat((self.cu_first, self.cu_keys[1:] + self.middle))
        return cu_queries, cu_sources, max(self.max_first, self.max_second), max(self.max_first, self.max_keys)

    @cached_property
    def padded(self) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """`padding` of the first half and of the second half's queries; (S, max_keys) places of the latter's keys."""
        first = padding(self.cu_first, self.max_first, self.middle)
        second = padding(self.cu_second, self.max_second, self.tokens - self.middle)
        return first, second, padding(self.cu_keys, self.max_keys, len(self.keys_at))[0]

    @cached_property
    def second_mask(self) -> torch.Tensor:
        """(S, 1, max_second, max_keys), true where a query of [p R] attends to a key."""
        queries, keys = self.cu_second.diff()[:, None, None], self.cu_keys.diff()[:, None, None]
        i = torch.arange(self.max_second, device=keys.device)[None, :, None]
        j = torch.arange(self.max_keys, device=keys.device)[None, None, :]
        return ((j <= i + keys - queries) & (j < keys))[:, None]


def padding(offsets: torch.Tensor, longest: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From a line of `total` tokens, sequences from `offsets` (B + 1,) on, to a padded table and back; no device sync.

    Returns:
        (B, longest) places in the line, past a sequence's end its last token's; (total,) places in the flattened table.
    """
    lengths = offsets.diff()
    steps = torch.arange(longest, device=offsets.device)
    there = offsets[:-1, None] + torch.minimum(steps[None], lengths[:, None] - 1)
    rows = torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths, output_size=total)
    back = torch.arange(total, device=offsets.device) - offsets[rows] + rows * longest
    return there, back
