"""Hand-written pairs over ten freely licensed photos that ship with the package (`photos/CREDITS.md`).

Chosen answers say what is there; rejected ones add or change a thing that a model is tempted to see. Two whole photos
are held out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.formats import features
from smolvlm_exp.data.loading import select_split
from smolvlm_exp.data.messages import pair

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = Path(__file__).parent / "photos"


@dataclass
class Config(DataConfig):
    """Nothing to choose but the slices."""


def load(config: Config, split: str) -> "Dataset":
    """The pairs of a split; each says in `pairs.jsonl` which split it belongs to."""
    from datasets import Dataset

    rows = [json.loads(line) for line in (FOLDER / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    splits = {
        name: Dataset.from_list([to_row(row) for row in rows if row["split"] == name], features=features())
        for name in ("train", "test")
    }
    return select_split(splits, split)


def to_row(row: dict[str, str]) -> dict[str, Any]:
    """{image, question, chosen, rejected} -> the normal form."""
    images = [{"bytes": (FOLDER / row["image"]).read_bytes(), "path": None}]
    return {**pair(images, row["question"], row["chosen"], row["rejected"]), "problem": ""}
