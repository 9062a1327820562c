"""Prepared rows -> what the engine reads: token ids as tensors, images as uint8 tiles, each computed once.

Ids and, after `pixels`, pixel values are those of TRL's DataCollatorForVisionPreference on the same row with the same
processor and max_length. An image that several rows share is one image here.
"""

import copy
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
import transformers

from smolvlm_exp.engine.disk_cache import DiskCache, MappedTensor
from smolvlm_exp.engine.inputs.packing import collate
from smolvlm_exp.engine.inputs.tiles import tile
from smolvlm_exp.utils.distributed import rank_slice, rank_world
from smolvlm_exp.utils.phases import phase
from smolvlm_exp.utils.progress import progress

VERSION = 1  # raise when tiles change: it is part of their cache key
SIDES = ("prompt", "chosen", "rejected")
COUNTS = tuple(f"{side}_tokens" for side in SIDES)
IMAGE_FACTS = ("image_sha256", "tile_rows", "tile_columns")
BATCH_TILES = 64  # that travel between processes, and through the vision tower, together


class PackedDataset(torch.utils.data.Dataset):
    """The rows of a preference data set as tensors on the CPU.

    `rows[i]` has `prompt_ids` (P,), `chosen_ids` (C,), `rejected_ids` (R,) int64; `tiles` (n, 3, S, S) uint8, those of
    the row's images in their order, or `features` (n, tokens, H) in their place; and `ref_chosen_logps`,
    `ref_rejected_logps`, 0-dim float32, where `reference` is set. Rows without answers have empty ones, (0,).

    Attributes:
        ids: (T,) int32, the tokens of all rows: prompt, chosen, rejected of the first row, then of the second ...
        offsets: (3 rows + 1,) int64, where each part begins in `ids`.
        image_hashes: sha256 of each distinct image's file, in ascending order: images are numbered by it.
        images: the numbers of each row's images, by row; see `keep_only`.
        tile_offsets: (images + 1,) where each image's tiles begin among the tiles of all.
        cached_tiles: None, or (tiles of all, 3, S, S) uint8; see `cache_tiles`.
        features: None, or (tiles of all, tokens, H); see features.py.
        reference: None, or two of (rows,) float32, chosen and rejected; see reference.py.
        pairs: whether rows have their rejected answers; see `chosen_only`.
        few_lengths: of batches; see packing.py's `padded`.
    """

    pairs = True
    few_lengths = False

    def __init__(self, rows: datasets.Dataset, processor: Any) -> None:
        """Opens no image.

        Args:
            rows: prepared and good; see data/preferences.py.
        """
        self.image_processor = processor.image_processor
        self.pad_token_id, self.image_token_id = processor.tokenizer.pad_token_id, processor.image_token_id
        self.cached_tiles: torch.Tensor | MappedTensor | None = None
        self.features: torch.Tensor | MappedTensor | None = None
        self.reference: tuple[torch.Tensor, torch.Tensor] | None = None
        self.files = rows.select_columns(["images"]).with_format("arrow")  # their stored bytes: nothing is decoded
        columns: Any = rows.select_columns([*COUNTS, *IMAGE_FACTS, "token_ids"]).with_format("arrow")[:]
        parts = [chunk.flatten().to_numpy() for chunk in columns["token_ids"].chunks]
        self.ids = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int32), *parts]))
        counts = np.column_stack([columns[name].to_numpy() for name in COUNTS])
        self.offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
        hashes, *shapes = (columns[name].to_pylist() for name in IMAGE_FACTS)
        first: dict[bytes, tuple[tuple[int, int], int]] = {}  # where it occurs first (row, place in it), its tiles
        for i, row in enumerate(zip(hashes, *shapes, strict=True)):
            for j, (image, down, across) in enumerate(zip(*row, strict=True)):
                first.setdefault(image, ((i, j), down * across + 1 if down else 1))
        self.image_hashes = sorted(first)  # so that cache keys do not depend on the order of rows
        self.locations = [first[image][0] for image in self.image_hashes]
        self.tile_offsets = [0, *accumulate(first[image][1] for image in self.image_hashes)]
        numbers = {image: number for number, image in enumerate(self.image_hashes)}
        self.images = {i: [numbers[image] for image in row] for i, row in enumerate(hashes)}

    def __len__(self) -> int:
        return len(self.files)

    def keep_only(self, rows: Sequence[int]) -> None:
        """Forget the images of all other rows, which cannot be read from here on; the numbers of rows stay.

        Tiles, features and reference log-probabilities are then computed for these rows alone.
        """
        used = sorted({image for i in rows for image in self.images[i]})
        counts = np.diff(self.tile_offsets)[used].tolist()
        numbers = {image: number for number, image in enumerate(used)}
        self.image_hashes = [self.image_hashes[image] for image in used]
        self.locations = [self.locations[image] for image in used]
        self.tile_offsets = [0, *accumulate(counts)]
        self.images = {i: [numbers[image] for image in self.images[i]] for i in rows}

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if i >= len(self):
            raise IndexError(i)  # which ends a loop over the rows
        if i not in self.images:
            raise KeyError(f"row {i} is none of the {len(self.images):,} that were prepared")
        bounds = self.offsets[3 * i : 3 * i + 4]
        sides = SIDES if self.pairs else SIDES[:2]
        row = {f"{side}_ids": self.ids[bounds[k] : bounds[k + 1]].long() for k, side in enumerate(sides)}
        row |= self.images_of(i)
        if self.reference is not None:
            row["ref_chosen_logps"], row["ref_rejected_logps"] = (logps[i] for logps in self.reference)
        return row

    def prompt_ids(self, i: int) -> torch.Tensor:
        return self.ids[self.offsets[3 * i] : self.offsets[3 * i + 1]].long()

    def images_of(self, i: int) -> dict[str, torch.Tensor]:
        """A row's `features` where they are kept, else its `tiles`."""
        if self.features is None:
            return {self.kind: concat([self.tiles(n) for n in self.images[i]], self.no_tiles)}
        return {self.kind: concat([self.features[self.span(n)] for n in self.images[i]], self.features[:0])}

    @property
    def kind(self) -> str:
        """Of what rows have of their images: `features` or `tiles`."""
        return "tiles" if self.features is None else "features"

    @property
    def precomputed(self) -> bool:
        """Whether the images are ready: then a batch is so little work that no other process need do it."""
        return self.features is not None or self.cached_tiles is not None

    def chosen_only(self) -> "PackedDataset":
        """The same rows without their rejected answers, over the same tiles and features."""
        view = copy.copy(self)
        view.pairs = False
        return view

    def batch(self, numbers: Sequence[int], images: dict[int, dict[str, torch.Tensor]] | None = None) -> dict[str, Any]:
        """packing.collate's batch of these rows, and `rows`, (B,), their numbers.

        Args:
            images: `tiles` or `features` that take the place of some rows' own, by row.
        """
        replaced = images or {}
        rows = [self[i] | replaced.get(i, {}) for i in numbers]
        fields = collate(rows, self.pad_token_id, self.image_token_id, self.few_lengths)
        return {**fields, "rows": torch.tensor(numbers)}

    def batch_of(self, examples: Sequence[dict[str, int]]) -> dict[str, Any]:
        """`batch`, for a DataLoader over {"row": number}."""
        return self.batch([example["row"] for example in examples])

    def span(self, image: int) -> slice:
        """Where an image's tiles are among the tiles of all."""
        return slice(self.tile_offsets[image], self.tile_offsets[image + 1])

    def tiles(self, image: int) -> torch.Tensor:
        """One image's tiles, (n, 3, S, S) uint8; computed now unless they are cached.

        Raises:
            ValueError: there are more or fewer of them than the prompt's tokens were made for.
        """
        if self.cached_tiles is not None:
            return self.cached_tiles[self.span(image)]
        tiles = tile(self.image(image), self.image_processor)
        expected = self.tile_offsets[image + 1] - self.tile_offsets[image]
        if len(tiles) != expected:
            i, j = self.locations[image]
            raise ValueError(
                f"row {i}, image {j + 1} becomes {len(tiles)} tiles, but the prompt has tokens for {expected}: the "
                "processor's size.longest_edge must be a multiple of its max_image_size.longest_edge."
            )
        return tiles

    def image(self, image: int) -> PIL.Image.Image:
        """Decoded from its stored bytes."""
        i, j = self.locations[image]
        return datasets.Image().decode_example(self.files[i].column("images")[0].as_py()[j])  # {"bytes", "path"}

    def tiles_of(self, images: Sequence[int]) -> torch.Tensor:
        """Several images' tiles, which travel between processes in shared memory."""
        return concat([self.tiles(image) for image in images], self.no_tiles)

    def tile_array(self, images: Sequence[int]) -> np.ndarray:
        """Several images' tiles, which travel between processes in a pipe."""
        return self.tiles_of(images).numpy()

    @phase("image_features")
    def cache_tiles(self, store: DiskCache, num_proc: int) -> None:
        """Compute all tiles now, with `num_proc` processes (0: this one), where the store has room for them.

        Processes of a torch.distributed group call it together, share the work and the store's one file.
        """

        def fill(cached: torch.Tensor) -> None:
            with progress("image tiles", len(cached) // rank_world()[1]) as advance:
                for start, tiles in self.tile_batches(rank_slice(len(self.image_hashes), *rank_world()), num_proc):
                    cached[start : start + len(tiles)] = tiles
                    advance(len(tiles))

        spec = torch.uint8, (self.tile_offsets[-1], *self.no_tiles.shape[1:])
        contents = f"{len(self.image_hashes):,} images"
        self.cached_tiles = store.tensor("tiles", contents, spec, fill, self.tile_key_parts())

    def tile_key_parts(self) -> dict[str, Any]:
        """Everything that decides the bytes of all tiles, for cache keys."""
        return {"pictures": hashlib.sha256(b"".join(self.image_hashes)).hexdigest(), **self.tiling()}

    def tiling(self) -> dict[str, Any]:
        """What decides how any image's file becomes tiles: the image processor and its code."""
        return {
            "version": VERSION,
            "image_processor": json.loads(self.image_processor.to_json_string()),
            "backend": type(self.image_processor).__name__,
            "pillow": PIL.__version__,
            "transformers": transformers.__version__,
        }

    def tile_batches(self, images: Sequence[int], num_proc: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Where a batch of tiles begins among all, and its tiles: of neighbouring `images`, at most `BATCH_TILES`.

        An image with more tiles is a batch of its own. `num_proc` processes tile; 0: this one.
        """
        batches: list[list[int]] = []
        for image in images:
            if not batches or self.tile_offsets[image + 1] - self.tile_offsets[batches[-1][0]] > BATCH_TILES:
                batches.append([])
            batches[-1].append(image)
        workers = min(num_proc, len(batches))
        largest = max([BATCH_TILES, *np.diff(self.tile_offsets)]) * math.prod(self.no_tiles.shape[1:])  # bytes
        work = self.tiles_of if room_in_shared_memory(4 * workers * largest) else self.tile_array
        for batch, tiles in zip(batches, batch_loader(work, batches, num_workers=workers), strict=True):
            yield self.tile_offsets[batch[0]], torch.as_tensor(tiles)

    @cached_property
    def no_tiles(self) -> torch.Tensor:
        """The tiles of a row without images."""
        side = self.image_processor.max_image_size["longest_edge"]
        return torch.empty(0, 3, side, side, dtype=torch.uint8)

    def sizes(self, rows: Sequence[int]) -> np.ndarray:
        """(len(rows), 4) int64: tokens of the prompt, of the chosen and of the rejected answer; tiles."""
        counts = np.diff(self.tile_offsets)
        tiles = [counts[self.images[i]].sum() for i in rows]
        tokens = np.diff(self.offsets).reshape(-1, 3)[rows]
        return np.column_stack((tokens, np.array(tiles, dtype=np.int64)))


def room_in_shared_memory(size: int) -> bool:
    """Whether `size` bytes fit: containers may have 64 MiB of it, and a process that asks for more is killed."""
    shared = Path("/dev/shm")
    return not shared.exists() or shutil.disk_usage(shared).free >= size


def concat(parts: list[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    """Parts end to end; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat([empty, *parts])


def batch_loader(collate: Callable[[list[int]], Any], batches: Iterable[list[int]], **options: Any) -> Any:
    """A DataLoader that gives `collate(numbers)` for each list of numbers in `batches`."""
    options |= {"collate_fn": collate, "generator": torch.Generator()}  # or it would draw from the run's own
    numbers: Any = range(sys.maxsize)  # whose items are their own indices
    return torch.utils.data.DataLoader(numbers, batch_sampler=batches, **options)
