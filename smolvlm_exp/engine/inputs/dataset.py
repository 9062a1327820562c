"""Rows of the normal form -> what the engine eats, made once: token ids up front, pictures as uint8 tiles.

Ids and, after `pixels`, pixel values are those of TRL's DataCollatorForVisionPreference on the same row with the same
processor and max_length. A picture that several rows share is one picture here.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
import transformers
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from smolvlm_exp.engine.disk_cache import DiskCache, MappedTensor, cache_key, cached_tensors
from smolvlm_exp.engine.inputs.packing import collate
from smolvlm_exp.engine.inputs.tiles import decode, file_of, height_and_width, tile
from smolvlm_exp.utils.distributed import rank_slice

VERSION = 1  # raise when tiles change: it is part of the key under which they are kept
SIDES = ("prompt", "chosen", "rejected")
TOKENISE_ROWS = 256  # rows whose texts are tokenised in one call
TRANSFER_BYTES = (
    2**22
)  # bytes of tiles that go from one process to another at a time: each journey costs some milliseconds


class PackedDataset(torch.utils.data.Dataset):
    """The rows of a preference data set as tensors on the CPU.

    `rows[i]` has `prompt_ids` (P,), `chosen_ids` (C,), `rejected_ids` (R,) int64; `tiles` (n, 3, S, S) uint8, those of
    the row's pictures in their order, or `features` (n, tokens, H) in their place; and `ref_chosen_logps`,
    `ref_rejected_logps`, 0-dim float32, where `reference` is set.

    Attributes:
        digests: sha256 of each distinct picture's file, in ascending order: pictures are numbered by it.
        pictures: for each row the numbers of its pictures among the distinct ones.
        spans: (pictures + 1,) where each distinct picture's tiles begin among the tiles of all.
        kept: None, or (tiles of all, 3, S, S) uint8; see `keep_tiles`.
        features: None, or (tiles of all, tokens, H); see features.py.
        reference: None, or two of (rows,) float32, chosen and rejected; see reference.py.
    """

    def __init__(self, rows: datasets.Dataset, processor: Any, max_length: int | None, num_proc: int = 0) -> None:
        """Tokenises all rows; opens no picture beyond its header.

        Args:
            rows: columns `images`, `prompt`, `chosen`, `rejected`; see data/preferences.py.
            max_length: tokens in prompt plus answer; an answer that runs past it is cut. None: no limit.
            num_proc: processes that tokenise; 0: this one.

        Raises:
            ValueError: a prompt leaves no room for an answer, or names more or fewer pictures than its row has.
        """
        self.image_processor = processor.image_processor
        self.kept: torch.Tensor | MappedTensor | None = None
        self.features: torch.Tensor | MappedTensor | None = None
        self.reference: tuple[torch.Tensor, torch.Tensor] | None = None
        self.files = rows.select_columns(["images"]).with_format("arrow")  # their stored bytes: nothing is decoded
        grids = self.look_at_pictures(processor)
        self.ids, self.offsets = tokenise(rows, processor, grids, max_length, num_proc)

    def look_at_pictures(self, processor: Any) -> list[list[tuple[int, int]]]:
        """Find the distinct pictures. For each row's pictures: (rows, columns) of tiles, (0, 0) for a single one."""
        shape = cache(processor.image_processor.get_number_of_image_patches)
        found: dict[bytes, tuple[tuple[int, int], tuple[int, int]]] = {}  # its first row and place there; its grid
        names: list[list[bytes]] = []
        for i in range(len(self.files)):
            names.append([])
            for j, entry in enumerate(self.entries(i)):
                data = file_of(entry)
                names[-1].append(hashlib.sha256(data).digest())
                if names[-1][-1] not in found:
                    found[names[-1][-1]] = (i, j), shape(*height_and_width(data))[1:]
        self.digests = sorted(found)  # whatever the order of the rows, so that it is no part of a key
        self.places = [found[digest][0] for digest in self.digests]
        grids = [found[digest][1] for digest in self.digests]
        self.spans = [0, *accumulate(rows * columns + 1 if rows else 1 for rows, columns in grids)]
        numbers = {digest: number for number, digest in enumerate(self.digests)}
        self.pictures = [[numbers[digest] for digest in row] for row in names]
        return [[grids[number] for number in row] for row in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        bounds = self.offsets[3 * i : 3 * i + 4]
        row = {f"{side}_ids": self.ids[bounds[k] : bounds[k + 1]].long() for k, side in enumerate(SIDES)}
        if self.features is None:
            row["tiles"] = concat([self.tiles(n) for n in self.pictures[i]], self.nothing)
        else:
            parts = [self.features[self.spans[n] : self.spans[n + 1]] for n in self.pictures[i]]
            row["features"] = concat(parts, self.features[:0])
        if self.reference is not None:
            row["ref_chosen_logps"], row["ref_rejected_logps"] = (logps[i] for logps in self.reference)
        return row

    def entries(self, i: int) -> list[dict[str, Any]]:
        """The pictures of row `i` as they are stored, {"bytes", "path"} each."""
        return self.files[i].column("images")[0].as_py() or []

    def tiles(self, picture: int) -> torch.Tensor:
        """One distinct picture's tiles, (n, 3, S, S) uint8; made now where they are not kept.

        Raises:
            ValueError: there are more or fewer of them than the prompt's tokens were made for.
        """
        if self.kept is not None:
            return self.kept[self.spans[picture] : self.spans[picture + 1]]
        i, j = self.places[picture]
        tiles = tile(decode(self.entries(i)[j]), self.image_processor)
        expected = self.spans[picture + 1] - self.spans[picture]
        if len(tiles) != expected:
            raise ValueError(
                f"row {i}, image {j + 1} becomes {len(tiles)} tiles where the prompt has places for {expected}: the "
                "processor's size.longest_edge must be a multiple of its max_image_size.longest_edge."
            )
        return tiles

    def keep_tiles(self, store: DiskCache | None, ram_budget: int, num_proc: int) -> None:
        """Make all tiles now and keep them: in RAM within `ram_budget` bytes, else in the store, else not at all.

        Processes of a torch.distributed group call it together, share the work and the store's one file.

        Args:
            num_proc: processes that tile; 0: this one.
        """

        def fill(tensors: Any, rank: int, processes: int) -> None:
            for picture, tiles in self.stream(rank_slice(len(self.digests), rank, processes), num_proc):
                tensors["tiles"][self.spans[picture] : self.spans[picture + 1]] = tiles

        layout = {"tiles": (torch.uint8, (self.spans[-1], *self.nothing.shape[1:]))}
        parts = self.tiles_made_of()
        what = f"tiles of {len(self.digests):,} pictures"
        kept = cached_tensors(what, cache_key("tiles", **parts), layout, fill, store, ram_budget, parts)
        self.kept = kept["tiles"] if kept else None

    def tiles_made_of(self) -> dict[str, Any]:
        """All that decides the tiles' bytes, for keys: the pictures' files, the image processor, its code."""
        return {
            "version": VERSION,
            "pictures": hashlib.sha256(b"".join(self.digests)).hexdigest(),
            "image_processor": json.loads(self.image_processor.to_json_string()),
            "backend": type(self.image_processor).__name__,
            "pillow": PIL.__version__,
            "transformers": transformers.__version__,
        }

    def stream(self, pictures: Sequence[int], num_proc: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(number, its tiles) of each of `pictures` in their order, tiled by `num_proc` processes; 0: by this one."""
        workers = min(num_proc, len(pictures)) if self.kept is None else 0  # else there is nothing left to do
        together = max(1, min(TRANSFER_BYTES // self.largest, len(pictures) // (4 * workers))) if workers else 1
        chunks = [pictures[i : i + together] for i in range(0, len(pictures), together)]
        made = TileLoader(self, arrays=not room_in_shared_memory(4 * workers * together * self.largest))
        for chunk, tiles in zip(chunks, in_order(made, chunks, workers), strict=True):
            counts = [self.spans[picture + 1] - self.spans[picture] for picture in chunk]
            yield from zip(chunk, torch.as_tensor(tiles).split(counts), strict=True)

    @property
    def largest(self) -> int:
        """Bytes of the tiles of the picture that has most."""
        return int(max(np.diff(self.spans), default=0)) * math.prod(self.nothing.shape[1:])

    @cached_property
    def nothing(self) -> torch.Tensor:
        """The tiles of a row without pictures."""
        side = self.image_processor.max_image_size["longest_edge"]
        return torch.empty(0, 3, side, side, dtype=torch.uint8)

    @cached_property
    def sizes(self) -> np.ndarray:
        """(rows, 4) int64: tokens of the prompt, of the chosen and of the rejected answer; tiles."""
        counts = np.diff(self.spans)
        tiles = [counts[row].sum() for row in self.pictures]
        return np.column_stack((np.diff(self.offsets).reshape(-1, 3), np.array(tiles, dtype=np.int64)))


@dataclass
class TileLoader(torch.utils.data.Dataset):
    """Some pictures' tiles: a tensor, which travels between processes in shared memory, or an array, in a pipe."""

    rows: PackedDataset
    arrays: bool

    def __getitem__(self, pictures: Sequence[int]) -> Any:
        tiles = concat([self.rows.tiles(picture) for picture in pictures], self.rows.nothing)
        return tiles.numpy() if self.arrays else tiles


def in_order(items: torch.utils.data.Dataset, keys: Sequence[Any], workers: int) -> Iterable[Any]:
    """`items[key]` of each of `keys`, made by `workers` processes; 0: by this one."""
    return torch.utils.data.DataLoader(
        items,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=identity,
        generator=torch.Generator(),  # or it would draw from the run's own
    )


def identity(item: Any) -> Any:
    return item


def room_in_shared_memory(size: int) -> bool:
    """Whether `size` bytes fit: containers may have 64 MiB of it, and a process that asks for more is ended."""
    shared = Path("/dev/shm")
    return not shared.exists() or shutil.disk_usage(shared).free >= size


@dataclass
class Collator:
    """For a DataLoader over {"row": number}: pairs.collate's batch and `rows`, (B,), those numbers."""

    rows: PackedDataset
    pad_token_id: int
    image_token_id: int

    def __call__(self, batch: Sequence[dict[str, int]]) -> dict[str, Any]:
        numbers = [int(example["row"]) for example in batch]
        fields = collate([self.rows[i] for i in numbers], self.pad_token_id, self.image_token_id)
        return {**fields, "rows": torch.tensor(numbers)}


def concat(parts: list[torch.Tensor], nothing: torch.Tensor) -> torch.Tensor:
    """Parts end to end; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat([nothing, *parts])


def tokenise(
    rows: datasets.Dataset,
    processor: Any,
    grids: list[list[tuple[int, int]]],
    max_length: int | None,
    num_proc: int = 0,
) -> tuple[torch.Tensor, np.ndarray]:
    """All rows' tokens in one line, (T,) int32: prompt, chosen, rejected of the first row, then of the second, ...

    Returns:
        the tokens; (3 rows + 1,) int64, where each part begins.
    """
    texts = TextTokenizer(rows.select_columns(list(SIDES)).with_format(None), processor, grids, max_length)
    workers = min(num_proc, len(rows) // (4 * TOKENISE_ROWS))  # to begin one costs what a thousand rows do
    ids, lengths = [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    for tokens, parts in in_order(texts, range(0, len(rows), TOKENISE_ROWS), workers):
        ids.append(tokens)
        lengths.append(parts)
    return torch.from_numpy(np.concatenate(ids)), np.cumsum(np.concatenate(lengths))


@dataclass
class TextTokenizer(torch.utils.data.Dataset):
    """`TOGETHER` rows from `start` on: their tokens, (T,) int32, and how many each part has, (3 rows,) int64."""

    rows: datasets.Dataset
    processor: Any
    grids: list[list[tuple[int, int]]]
    max_length: int | None

    def __getitem__(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = range(start, min(start + TOKENISE_ROWS, len(self.rows)))
        texts = [text for i in numbers for text in row_texts(self.rows[i], self.processor, self.grids[i], i)]
        found = self.processor.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for k, number in zip(range(0, len(found), 3), numbers, strict=True):
            room = None if self.max_length is None else self.max_length - len(found[k])
            found[k + 1 : k + 3] = [ids[:room] for ids in found[k + 1 : k + 3]]
            if (room is not None and room <= 0) or not all(found[k + 1 : k + 3]):
                raise ValueError(
                    f"row {number}: its prompt is {len(found[k])} tokens and data.max_length={self.max_length} leaves "
                    "none of an answer. Raise it, or leave such rows out with data.on_bad_row=skip."
                )
        return np.fromiter(chain.from_iterable(found), dtype=np.int32), np.array([len(ids) for ids in found])


def row_texts(row: dict[str, Any], processor: Any, grids: list[tuple[int, int]], number: int) -> list[str]:
    """The row's prompt, with each picture's placeholder written out, and its two answers, as the tokenizer reads them.

    Args:
        grids: (rows, columns) of tiles of each of its pictures.
    """
    try:
        prompt = prepare_multimodal_messages(row["prompt"], images=[None] * len(grids))
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None
    answers = {side: prepare_multimodal_messages(row[side]) for side in SIDES[1:]}
    texts = apply_chat_template({"prompt": prompt, **answers}, processor)
    words = texts["prompt"].split(processor.image_token)
    if len(words) != len(grids) + 1:
        raise ValueError(f"row {number}: its prompt names {len(words) - 1} images and it has {len(grids)}")
    spans = [processor.replace_image_token({"rows": [[r]], "cols": [[c]]}, 0) for r, c in grids]
    written = "".join(word + span for word, span in zip(words, [*spans, ""], strict=True))
    return [written, texts["chosen"], texts["rejected"]]
