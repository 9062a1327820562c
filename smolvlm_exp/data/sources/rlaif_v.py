"""RLAIF-V in the normal form already: HuggingFaceH4/rlaif-v_formatted, or any dataset with the same four columns."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.loading import convert, fetch, require_embedded
from smolvlm_exp.data.messages import bad_row, conversation

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Config(DataConfig):
    """78,975 train and 4,157 test rows, CC BY-NC 4.0; the defaults take the published recipe's 4,738 and 42."""

    train: str = "train[:6%]"
    test: str = "test[:1%]"
    id: str = "HuggingFaceH4/rlaif-v_formatted"  # on the Hub, or a local folder with a copy of it
    revision: str | None = None  # branch, tag or commit on the Hub; null: the newest


def load(config: Config, split: str) -> "Dataset":
    """The rows of a split, each with its first image only, as in the recipe."""
    rows = fetch(config.id, config.revision, split, {"images", "prompt", "chosen", "rejected"})
    return convert(rows, first_image, num_proc=config.num_proc)


def first_image(row: dict[str, Any]) -> dict[str, Any]:
    """Drop every image but the first, and its part in the prompt."""
    try:
        messages = conversation(row, images=1)
        images = require_embedded((row["images"] or [])[:1])
    except ValueError as error:
        return bad_row(str(error))
    first = next((p for message in messages["prompt"] for p in message["content"] if p["type"] == "image"), None)
    for message in messages["prompt"]:
        message["content"] = [part for part in message["content"] if part["type"] != "image" or part is first]
    return {**messages, "images": images, "problem": ""}
