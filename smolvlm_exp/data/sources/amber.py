"""AMBER (arXiv 2311.07397): captions and yes/no questions with annotated truth, from its `data` folder and its images.

Queries 1 to 1004 ask for captions: `truth` in annotations.json lists what is in the image, `hallu` what might well be,
but is not. The others are yes/no questions about existence, attributes and relations; AMBER's F1 counts `no`, a
hallucination recognised as one, as the positive class.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from smolvlm_exp.data.benchmarks import question_rows, read_entries, read_object, require_columns
from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.loading import read_text
from smolvlm_exp.data.vocabulary import Amber
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Config(DataConfig):
    folder: str = MISSING  # AMBER's `data`, with annotations.json, relation.json, safe_words.txt and query/
    images: str = MISSING  # the folder that holds AMBER_1.jpg and so on
    query: str = "query_all.json"  # a file in query/: also query_generative.json, query_discriminative-existence.json


def load(config: Config, split: str) -> "Dataset":
    """The queries of a split: all are `test`."""
    folder = Path(config.folder)
    annotations = {
        entry["id"]: (where, entry)
        for where, entry in read_entries(folder / "annotations.json", "data.folder", {"id": int, "type": str})
    }
    questions = []
    columns = {"id": int, "image": str, "query": str}
    for where, entry in read_entries(folder / "query" / config.query, "data.query", columns):
        if entry["id"] not in annotations:
            raise RequestError(f"{where}: id {entry['id']} is not in {folder / 'annotations.json'}.")
        questions.append((entry["image"], entry["query"], truth_of(*annotations[entry["id"]])))
    return question_rows(questions, config.images, split)


def truth_of(where: str, annotation: dict[str, Any]) -> dict[str, Any]:
    if annotation["type"] == "generative":
        require_columns(annotation, where, {"truth": list, "hallu": list})
        return {"kind": "caption", "objects": annotation["truth"], "expected": annotation["hallu"]}
    if annotation.get("truth") not in ("yes", "no"):
        raise RequestError(f"{where}: truth is {annotation.get('truth')!r}; expected yes or no.")
    return {"kind": "yes_no", "answer": annotation["truth"], "positive": "no"}


def words(config: Config) -> Amber:
    """Which words stand for which objects."""
    folder = Path(config.folder)
    related = read_object(folder / "relation.json", "data.folder", {})
    safe = read_text(folder / "safe_words.txt", "data.folder").split()
    for name, others in related.items():
        if not isinstance(others, list):
            raise RequestError(f"{folder / 'relation.json'}: {name} should have a list of words.")
    return Amber(related, safe)
