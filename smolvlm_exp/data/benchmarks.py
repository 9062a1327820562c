"""Benchmarks for task=evaluate: images, questions and the truth (truth.py) from local files, without answers."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.images import ImageError, locate
from smolvlm_exp.data.loading import convert, json_objects, parse_json, read_text, select_split
from smolvlm_exp.data.messages import features, user
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset

Question = tuple[str, str, dict[str, Any]]  # the image's path below the folder, the question, the truth


def question_rows(questions: list[Question], images: str, split: str) -> "Dataset":
    """Rows in the normal form, without answers. A missing image is its row's problem, not an error here."""
    from datasets import Features, Value

    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise RequestError(f"data.images={images}: there is no such folder.")
    if split.startswith("train"):
        raise RequestError(
            "this data has questions without preferred answers: use it with task=evaluate, not training."
        )
    columns = {name: kind for name, kind in features().items() if name not in ("chosen", "rejected")}
    rows = [{"image": image, "question": text, "truth": json.dumps(truth)} for image, text, truth in questions]
    test = convert(rows, to_row, folder, Features({**columns, "truth": Value("string")}))
    return select_split({"test": test}, split)


def to_row(row: dict[str, str], folder: Path) -> dict[str, Any]:
    images, problem = [], ""
    try:
        images = [locate(row["image"], folder)]
    except ImageError as error:
        problem = f"the image {error}"
    return {"images": images, "prompt": [user(row["question"])], "truth": row["truth"], "problem": problem}


def read_entries(path: Path, key: str, columns: Mapping[str, type]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON Lines or of a JSON list, each after its place; `key` is the file's setting."""
    where = None
    for where, entry in json_objects(read_text(path, key), str(path)):
        yield where, require_columns(entry, where, columns)
    if where is None:
        raise RequestError(f"{path} is empty.")


def read_object(path: Path, key: str, columns: Mapping[str, type]) -> dict[str, Any]:
    """The object that a file holds."""
    return require_columns(parse_json(read_text(path, key), str(path)), str(path), columns)


def require_columns(entry: Any, where: str, columns: Mapping[str, type]) -> dict[str, Any]:
    """The entry. Raises RequestError unless it is an object with these columns."""
    if not isinstance(entry, dict):
        raise RequestError(f"{where} is {type(entry).__name__}, not an object {{...}}.")
    for name, kind in columns.items():
        if not isinstance(entry.get(name), kind):
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in columns.items())
            raise RequestError(f"{where}: expected an object with {expected}; it has no such {name}.")
    return entry
