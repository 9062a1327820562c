"""Rows of the normal form -> what the engine eats, made once: token ids up front, pictures as uint8 tiles.

Ids and, after `pixels`, pixel values are those of TRL's DataCollatorForVisionPreference on the same row with the same
processor and max_length. A picture that several rows share is one picture here.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from smolvlm_exp.engine.pairs import collate

SIDES = ("prompt", "chosen", "rejected")
TOGETHER = 256  # rows whose texts are tokenised in one call
ORIENTATION = 0x0112  # EXIF; 5 to 8 lie on their side


class Rows(torch.utils.data.Dataset):
    """The rows of a preference data set as tensors on the CPU.

    `rows[i]` has `prompt_ids` (P,), `chosen_ids` (C,), `rejected_ids` (R,) int64; `tiles` (n, 3, S, S) uint8, those of
    the row's pictures in their order, or `features` (n, tokens, H) in their place; and `ref_chosen_logps`,
    `ref_rejected_logps`, 0-dim float32, where `reference` is set.

    Attributes:
        digests: sha256 of each distinct picture's file.
        pictures: for each row the numbers of its pictures among the distinct ones.
        spans: (pictures + 1,) where each distinct picture's tiles begin among the tiles of all.
        features: None, or (tiles of all, tokens, H); see features.py.
        reference: None, or two of (rows,) float32, chosen and rejected; see reference.py.
    """

    def __init__(self, rows: datasets.Dataset, processor: Any, max_length: int | None) -> None:
        """Tokenises all rows; opens no picture beyond its header.

        Args:
            rows: columns `images`, `prompt`, `chosen`, `rejected`; see data/preferences.py.
            max_length: tokens in prompt plus answer; an answer that runs past it is cut. None: no limit.

        Raises:
            ValueError: a prompt leaves no room for an answer, or names more or fewer pictures than its row has.
        """
        self.image_processor = processor.image_processor
        self.features: torch.Tensor | None = None
        self.reference: tuple[torch.Tensor, torch.Tensor] | None = None
        self.files = rows.select_columns(["images"]).with_format("arrow")  # their stored bytes: nothing is decoded
        grids = self.look_at_pictures(processor)
        self.ids, self.offsets = tokenise(rows, processor, grids, max_length)

    def look_at_pictures(self, processor: Any) -> list[list[tuple[int, int]]]:
        """Find the distinct pictures. For each row's pictures: (rows, columns) of tiles, (0, 0) for a single one."""
        numbers: dict[bytes, int] = {}
        self.places: list[tuple[int, int]] = []  # the row and the place in it where a picture first occurs
        self.pictures: list[list[int]] = []
        grids: list[tuple[int, int]] = []
        shape = cache(processor.image_processor.get_number_of_image_patches)
        for i in range(len(self.files)):
            self.pictures.append([])
            for j, entry in enumerate(self.entries(i)):
                data = file_of(entry)
                number = numbers.setdefault(hashlib.sha256(data).digest(), len(grids))
                if number == len(grids):
                    self.places.append((i, j))
                    grids.append(shape(*height_and_width(data))[1:])
                self.pictures[-1].append(number)
        self.digests = list(numbers)
        self.spans = [0, *accumulate(rows * columns + 1 if rows else 1 for rows, columns in grids)]
        return [[grids[number] for number in row] for row in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        bounds = self.offsets[3 * i : 3 * i + 4]
        row = {f"{side}_ids": self.ids[bounds[k] : bounds[k + 1]].long() for k, side in enumerate(SIDES)}
        if self.features is None:
            row["tiles"] = joined([self.tiles(number) for number in self.pictures[i]], self.nothing)
        else:
            parts = [self.features[self.spans[n] : self.spans[n + 1]] for n in self.pictures[i]]
            row["features"] = joined(parts, self.features[:0])
        if self.reference is not None:
            row["ref_chosen_logps"], row["ref_rejected_logps"] = (logps[i] for logps in self.reference)
        return row

    def entries(self, i: int) -> list[dict[str, Any]]:
        """The pictures of row `i` as they are stored, {"bytes", "path"} each."""
        return self.files[i].column("images")[0].as_py() or []

    def tiles(self, picture: int) -> torch.Tensor:
        """One distinct picture's tiles, (n, 3, S, S) uint8.

        Raises:
            ValueError: there are more or fewer of them than the prompt's tokens were made for.
        """
        i, j = self.places[picture]
        tiles = tile(decode(self.entries(i)[j]), self.image_processor)
        expected = self.spans[picture + 1] - self.spans[picture]
        if len(tiles) != expected:
            raise ValueError(
                f"row {i}, image {j + 1} becomes {len(tiles)} tiles where the prompt has places for {expected}: the "
                "processor's size.longest_edge must be a multiple of its max_image_size.longest_edge."
            )
        return tiles

    @cached_property
    def nothing(self) -> torch.Tensor:
        """The tiles of a row without pictures."""
        side = self.image_processor.max_image_size["longest_edge"]
        return torch.empty(0, 3, side, side, dtype=torch.uint8)

    def length(self, i: int) -> int:
        """Tokens of row `i`: its prompt and both answers."""
        return int(self.offsets[3 * i + 3] - self.offsets[3 * i])


@dataclass
class Collator:
    """For a DataLoader over {"row": number}: pairs.collate's batch and `rows`, (B,), those numbers."""

    rows: Rows
    pad_token_id: int
    image_token_id: int

    def __call__(self, batch: Sequence[dict[str, int]]) -> dict[str, Any]:
        numbers = [int(example["row"]) for example in batch]
        fields = collate([self.rows[i] for i in numbers], self.pad_token_id, self.image_token_id)
        return {**fields, "rows": torch.tensor(numbers)}


def joined(parts: list[torch.Tensor], nothing: torch.Tensor) -> torch.Tensor:
    """Parts end to end; a single one is not copied."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else nothing


def tokenise(
    rows: datasets.Dataset, processor: Any, grids: list[list[tuple[int, int]]], max_length: int | None
) -> tuple[torch.Tensor, np.ndarray]:
    """All rows' tokens in one line, (T,) int32: prompt, chosen, rejected of the first row, then of the second, ...

    Returns:
        the tokens; (3 rows + 1,) int64, where each part begins.
    """
    texts = rows.select_columns(list(SIDES)).with_format(None)
    pieces, lengths = [], []
    for start in range(0, len(texts), TOGETHER):
        flat = []
        for i in range(start, min(start + TOGETHER, len(texts))):
            flat += row_texts(texts[i], processor, grids[i], i)
        found = processor.tokenizer(flat, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for k in range(0, len(found), 3):
            prompt, room = found[k], None if max_length is None else max_length - len(found[k])
            answers = [ids[:room] for ids in found[k + 1 : k + 3]]
            if (room is not None and room <= 0) or not all(answers):
                raise ValueError(
                    f"row {start + k // 3}: its prompt is {len(prompt)} tokens and data.max_length={max_length} leaves "
                    "none of an answer. Raise it, or leave such rows out with data.on_bad_row=skip."
                )
            for ids in (prompt, *answers):
                pieces.append(np.asarray(ids, dtype=np.int32))
                lengths.append(len(ids))
    ids = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, dtype=torch.int32)
    return ids, np.cumsum([0, *lengths], dtype=np.int64)


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


def file_of(entry: dict[str, Any]) -> bytes:
    """A picture's file, from the row itself or from disk."""
    return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()


def height_and_width(data: bytes) -> tuple[int, int]:
    """A picture's size as `decode` will give it, from its header alone."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(ORIENTATION, 1) >= 5 else (height, width)


def decode(entry: dict[str, Any]) -> PIL.Image.Image:
    """The picture as `datasets` would hand it to TRL's collator."""
    return datasets.Image().decode_example(entry)


def tile(image: PIL.Image.Image, image_processor: Any) -> torch.Tensor:
    """(n, 3, S, S) uint8: what the image processor makes of a picture before it turns its bytes into floats."""
    done = image_processor(
        [[image]], do_rescale=False, do_normalize=False, do_pad=False, return_row_col_info=False, return_tensors="pt"
    )
    tiles = done["pixel_values"][0]
    assert tiles.dtype == torch.uint8, f"the image processor gave {tiles.dtype} before rescaling"
    return tiles


def pixels(processor: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The processor's last step, for tiles on any device: (n, 3, S, S) uint8 -> (x * rescale - mean) / std, float32."""
    options = processor.image_processor
    scale = options.rescale_factor if options.do_rescale else 1.0
    mean, std = (options.image_mean, options.image_std) if options.do_normalize else ([0.0] * 3, [1.0] * 3)
    factor = torch.tensor([scale / s for s in std]).view(3, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(3, 1, 1)

    @cache
    def on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return factor.to(device), shift.to(device)

    def normalise(tiles: torch.Tensor) -> torch.Tensor:
        times, minus = on(tiles.device)
        return (tiles * times).sub_(minus)

    return normalise
