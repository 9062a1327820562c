"""How long a data set's rows will be, for `task=plan`: measured where the data is on this disk, assumed elsewhere.

Nothing is prepared and no image is decoded: its header tells how many tiles it becomes. Upstream's own functions for
this would take seconds to import.
"""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data.messages import text_of
from smolvlm_exp.data.preferences import load_rows
from smolvlm_exp.data.tokens import image_span
from smolvlm_exp.models.model import ModelConfig, checkpoint_file, choose_resolution
from smolvlm_exp.models.resolution import FILES, MAX_TILES, Resolution, saved_resolution
from smolvlm_exp.models.shape import Shape
from smolvlm_exp.training.arguments import TrainerConfig
from smolvlm_exp.utils.errors import RequestError

SAMPLE_SIZE = 256  # rows, evenly spaced
CHARS_PER_TOKEN = 3.5  # where no tokenizer is on this disk: English prose has 4 to 4.5
TEMPLATE, ANSWER_END, QUESTION = 12, 2, 40  # tokens of the chat template, behind an answer, of an assumed question
PLAIN_TAG = 8  # tokens more that `<row_1_col_1>` takes where it is text to the tokenizer
HUB_ROWS = {
    "HuggingFaceH4/rlaif-v_formatted": {"train": 78_975, "test": 4_157}, "openbmb/RLHF-V-Dataset": {"train": 5_733},
}  # fmt: skip


@dataclass
class RowLengths:
    sizes: list[tuple[int, int, int, int]]  # tokens of prompt, chosen, rejected, and tiles: of all rows or a sample
    rows: int | None  # of the data set
    held_out: int | None  # its rows for evaluation
    truth: bool  # it knows what is true of them
    description: str  # of where these numbers come from


class RowLengthsOf:
    """`row_lengths`, read once for each model, resolution and kind of row."""

    def __init__(self) -> None:
        self.known: dict[str, RowLengths] = {}

    def __call__(self, config: Config) -> RowLengths:
        trainer = config.trainer
        key = repr((config.model, config.data, config.task, trainer.samples_answers, trainer.needs_rejected))
        if key not in self.known:
            self.known[key] = row_lengths(config)
        return self.known[key]


def row_lengths(config: Config) -> RowLengths:
    """
    Raises:
        RequestError: the data is on this disk and cannot be read, or task.image_size is no size.
    """
    data: Any = config.data
    shape, task = config.model.shape, config.task
    assert shape is not None
    if not hasattr(data, "id") or Path(data.id).expanduser().is_dir():  # sources without an id read local files alone
        return sample_lengths(data, config.model, shape, config.trainer)
    size = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", task.image_size)
    if size is None:
        raise RequestError(f"task.image_size={task.image_size} is no size; write it as 512x384.")
    resolution = model_resolution(config.model, shape)
    typical = tile_grid(int(size[1]), int(size[2]), resolution, data.max_edge)
    largest = tile_grid(data.max_edge, data.max_edge, resolution, data.max_edge)
    prompts = [image_tokens(*grid, shape) + TEMPLATE + QUESTION for grid in (typical, largest)]
    tiles, most_tiles = (rows * columns + 1 for rows, columns in (typical, largest))
    short, long = task.answer_tokens, 2 * task.answer_tokens
    # One row in ten is of the longest: enough of them to fill any micro-batch.
    sizes = [*[(prompts[0], short, short, tiles)] * 9, (prompts[1], long, long, most_tiles)] * 256
    description = (
        f"assumed rows: an image of {task.image_size} ({tiles} tiles, {tiles * shape.image_seq_len:,} tokens) "
        f"and answers of {short} tokens; the longest have {most_tiles} tiles and answers of {long} tokens "
        "(task.image_size, task.answer_tokens)"
    )
    rows = task.rows or hub_rows(data, data.train)
    held_out = hub_rows(data, data.test) or (rows and round(getattr(data, "test_fraction", 0.0) * rows))
    return RowLengths(sizes, rows, held_out, False, description)


def sample_lengths(data: Any, model: ModelConfig, shape: Shape, trainer: TrainerConfig) -> RowLengths:
    """The sizes of some of the data set's own rows; where answers are the model's own, those of rows do not count."""
    from datasets import disable_progress_bars
    from PIL import Image

    from smolvlm_exp.data.images import FORMATS, read_image_bytes
    from smolvlm_exp.data.loading import undecoded

    disable_progress_bars()
    resolution = model_resolution(model, shape)
    count: int | None = getattr(data, "train_rows", None)
    if count is not None:  # the source draws its rows: no more than the sample need be drawn
        data = replace(data, train_rows=min(count, SAMPLE_SIZE))
    rows = load_rows(data, "train", answers=not trainer.samples_answers, rejected=trainer.needs_rejected)
    answers = () if trainer.samples_answers else ("chosen", "rejected")
    sides = [side for side in answers if side in rows.column_names]
    step = max(len(rows) // SAMPLE_SIZE, 1)
    tokens, method = token_counter(model)
    sizes = []
    for row in undecoded(rows.select(range(0, len(rows), step)), ["images", "prompt", *sides]):
        grids = []
        try:
            for entry in row["images"] or []:
                with Image.open(io.BytesIO(read_image_bytes(entry)), formats=FORMATS) as image:
                    grids.append(tile_grid(*image.size, resolution, data.max_edge))
        except (OSError, ValueError):
            continue  # a bad row, which the run itself reports
        prompt = sum(image_tokens(*grid, shape) for grid in grids) + TEMPLATE + tokens(text_of(row["prompt"]))
        chosen, rejected, *_ = (*(tokens(text_of(row[side])) + ANSWER_END for side in sides), 0, 0)
        sizes.append((prompt, chosen, rejected, sum(r * c + 1 for r, c in grids)))
    if not sizes:
        raise RequestError(f"data={data.source}: none of its rows in data.train={data.train} can be read.")
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected, _ in sizes)
    description = (
        f"rows: {len(sizes)} of data={data.source}, the longest {longest:,} tokens, "
        f"at most {max(size[3] for size in sizes)} tiles ({method})"
    )
    held_out: int | None = getattr(data, "test_rows", None)
    tested = load_rows(replace(data, test_rows=1) if held_out else data, "test")
    return RowLengths(sizes, count or len(rows), held_out or len(tested), "truth" in tested.column_names, description)


def model_resolution(model: ModelConfig, shape: Shape) -> Resolution:
    """As a run will have it; where the checkpoint's processor is not on this disk, of the released checkpoints'."""
    files = filter(None, (checkpoint_file(model, name) for name in FILES))
    return choose_resolution(
        model, saved_resolution(files) or Resolution(shape.image_size, MAX_TILES * shape.image_size)
    )


def tile_grid(width: int, height: int, resolution: Resolution, max_edge: int) -> tuple[int, int]:
    """Rows and columns of an image's tiles, once data.max_edge has shrunk it."""
    shrink = min(max_edge / max(width, height), 1.0)
    return resolution.grid(max(round(width * shrink), 1), max(round(height * shrink), 1))


def image_tokens(rows: int, columns: int, shape: Shape) -> int:
    """Tokens of an image in a prompt, its tags included."""
    span = image_span(rows, columns, shape.image_seq_len)
    plain = PLAIN_TAG if shape.global_image_token_id is None else 0
    return span.count("<") + rows + plain * (rows * columns + 1)


def token_counter(model: ModelConfig) -> tuple[Callable[[str], int], str]:
    """A function that counts a text's tokens, and a description of how."""
    from tokenizers import Tokenizer

    file = checkpoint_file(model, "tokenizer.json")
    if file is None:
        return lambda text: math.ceil(len(text) / CHARS_PER_TOKEN), f"one token per {CHARS_PER_TOKEN} letters"
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), "the model's own tokenizer"


def hub_rows(data: Any, split: str) -> int | None:
    """How many rows a split or slice names, where the size of the data set is known."""
    from smolvlm_exp.data.loading import spans_of, split_names

    known = HUB_ROWS.get(data.id, {})
    if not split_names(split) <= known.keys():
        return None
    return sum(stop - start for _, start, stop in spans_of(split, known))
