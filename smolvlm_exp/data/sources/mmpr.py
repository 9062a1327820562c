"""MMPR: three million reasoning pairs (OpenGVLab/MMPR), from an unpacked local copy.

Download the dataset and unpack its two archives: each part is a JSONL file and a folder of images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.formats import row_images
from smolvlm_exp.data.loading import convert, first_cause, hold_out, select_columns, select_split, undecoded
from smolvlm_exp.data.sources.files import to_row
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Config(DataConfig):
    """One part of MMPR: its annotation file and the folder that its image paths count from."""

    annotations: str = MISSING  # a JSONL file with image, question, chosen, rejected
    images: str = MISSING  # the folder that `image` counts from
    test_fraction: float = 0.02  # share held out, by image: MMPR has a train split alone


def load(config: Config, split: str) -> "Dataset":
    """The rows of a split, whose images stay files until they are prepared."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    annotations, images = Path(config.annotations).expanduser(), Path(config.images).expanduser()
    if not annotations.is_file():
        raise RequestError(f"data.annotations={annotations}: there is no such file.")
    if not images.is_dir():
        raise RequestError(f"data.images={images}: there is no such folder.")
    try:
        rows = load_dataset("json", data_files=str(annotations), split="train")
    except DatasetGenerationError as error:
        raise RequestError(f"data.annotations={annotations} is not JSONL: {first_cause(error)}") from error
    rows = select_columns(rows, ["image", "question", "chosen", "rejected"], str(annotations))
    keys = [str(row_images(row)) for row in undecoded(rows, ["image"])]
    chosen = select_split(hold_out(rows, keys, config.test_fraction), split)  # first: it is often a small part
    return convert(chosen, to_row, images, num_proc=config.num_proc)
