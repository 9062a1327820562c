"""RLHF-V: 5,733 pairs in which people corrected a model's hallucinations (openbmb/RLHF-V-Dataset)."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.images import ImageError
from smolvlm_exp.data.loading import convert, fetch, require_embedded
from smolvlm_exp.data.messages import bad_row, pair

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Config(DataConfig):
    """There is only a train split, so its last 2% (115 rows) are held out."""

    train: str = "train[:98%]"
    test: str = "train[98%:]"
    id: str = "openbmb/RLHF-V-Dataset"  # on the Hub, or a local folder with a copy of it
    revision: str | None = None  # branch, tag or commit on the Hub; null: the newest


def load(config: Config, split: str) -> "Dataset":
    """The rows of a split; one whose `text` is not the expected JSON is a bad row."""
    rows = fetch(config.id, config.revision, split, {"image", "text"})
    return convert(rows, to_row, num_proc=config.num_proc)


def to_row(row: dict[str, Any]) -> dict[str, Any]:
    """{image, text: a JSON string {question, chosen, rejected}} -> the normal form."""
    try:
        text = json.loads(row["text"])
        question, chosen, rejected = (str(text[key]) for key in ("question", "chosen", "rejected"))
        images = require_embedded([row["image"]] if row["image"] else [])
    except ImageError as error:
        return bad_row(f"image 1 {error}")
    except (ValueError, KeyError, TypeError):
        return bad_row("`text` is not a JSON object with question, chosen and rejected")
    return pair(images, question, chosen, rejected)
