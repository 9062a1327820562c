"""POPE (arXiv 2305.10355): is there such an object in the image? Reads its downloaded question files.

Each line of a file is {"question_id", "image", "text", "label"}: `coco_pope_random.json`, `..._popular.json`,
`..._adversarial.json` over 500 images of COCO's val2014, and likewise for A-OKVQA and GQA.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from smolvlm_exp.data.benchmarks import question_rows, read_entries
from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Config(DataConfig):
    questions: str = MISSING  # one of POPE's files
    images: str = MISSING  # the folder that holds its images, as COCO's val2014


def load(config: Config, split: str) -> "Dataset":
    """The questions of a split: all are `test`."""
    questions, columns = [], {"image": str, "text": str, "label": str}
    for where, entry in read_entries(Path(config.questions), "data.questions", columns):
        answer = entry["label"].strip().lower()
        if answer not in ("yes", "no"):
            raise RequestError(f"{where}: label is {entry['label']!r}; expected yes or no.")
        questions.append((entry["image"], entry["text"], {"kind": "yes_no", "answer": answer}))
    return question_rows(questions, config.images, split)
