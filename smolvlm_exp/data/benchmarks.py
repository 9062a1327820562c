"""What sources with questions alone share: pictures, questions and the truth, from local files, for task=evaluate.

A row's `truth` is JSON, one of

    {"kind": "yes_no", "answer": "yes"}           `"positive": "no"` too where the benchmark's F1 takes no for it
    {"kind": "caption", "objects": ["dog", ...]}  what is in the picture; `expected`: what is not, but might well be

There is no pair of answers, so such a source has no rows to train on.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.formats import features
from smolvlm_exp.data.images import ImageError, locate
from smolvlm_exp.data.loading import files_digest, select_split
from smolvlm_exp.data.messages import user
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import json_lines

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 1  # raise when rows come out differently: it is part of the key under which `datasets` keeps them

Question = tuple[str, str, dict[str, Any]]  # the picture's path below the folder, the question, the truth


def rows_of(questions: list[Question], images: str, split: str) -> "Dataset":
    """Rows in the normal form, without answers. A picture that is not there is its row's problem, not an error here.

    Raises:
        RequestError: there is no such folder, or the split is none of `test`.
    """
    from datasets import Dataset, Features, Value

    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise RequestError(f"data.images={images}: there is no such folder.")
    if split.startswith("train"):
        raise RequestError(
            "this data has questions without answers to prefer: it is for task=evaluate, not to train on."
        )
    known = {name: kind for name, kind in features().items() if name not in ("chosen", "rejected")}
    seen = files_digest(([image] for image, _, _ in questions), folder)
    told = [(image, question, json.dumps(truth)) for image, question, truth in questions]
    kwargs = {"questions": told, "folder": folder, "stamp": f"{VERSION} {seen}"}
    made = Dataset.from_generator(generate, features=Features({**known, "truth": Value("string")}), gen_kwargs=kwargs)
    return select_split({"test": made}, split)


def generate(questions: list[tuple[str, str, str]], folder: Path, stamp: str) -> Iterator[dict[str, Any]]:
    """Row by row; `stamp` is unused here, but part of the key under which `datasets` keeps them."""
    for image, question, truth in questions:
        row: dict[str, Any] = {"images": [], "prompt": [user(question)], "truth": truth, "problem": ""}
        try:
            row["images"] = [locate(image, folder)]
        except ImageError as error:
            row["problem"] = f"the picture {error}"
        yield row


def entries(path: Path, key: str, columns: Mapping[str, type]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one in each line, or with a list of them, and where each stands.

    Args:
        key: the setting that names the file.
        columns: what each object must have, and its type.

    Raises:
        RequestError: naming the file, and the line or entry that is wrong.
    """
    text = text_of_file(path, key)
    if text.lstrip().startswith("["):
        found = ((f"{path}, entry {number}", entry) for number, entry in enumerate(parsed(text, str(path)), start=1))
    else:
        found = ((f"{path}, line {n}", parsed(line, f"{path}, line {n}")) for n, line in json_lines(text))
    empty = True
    for where, entry in found:
        empty = False
        yield where, checked(entry, where, columns)
    if empty:
        raise RequestError(f"{path} is empty.")


def checked(entry: Any, where: str, columns: Mapping[str, type]) -> dict[str, Any]:
    """Raises:
    RequestError: it is no object with these columns.
    """
    if not isinstance(entry, dict):
        raise RequestError(f"{where}: expected an object {{...}}, and it is {type(entry).__name__}.")
    for name, kind in columns.items():
        if not isinstance(entry.get(name), kind):
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in columns.items())
            raise RequestError(f"{where}: expected an object with {expected}; it has no such {name}.")
    return entry


def json_object(path: Path, key: str, columns: Mapping[str, type]) -> dict[str, Any]:
    """A file that holds one object. Raises as `entries`."""
    return checked(parsed(text_of_file(path, key), str(path)), str(path), columns)


def parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}") from error


def text_of_file(path: Path, key: str) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{key}: {path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise RequestError(f"{key}: {path} cannot be read: {error.strerror}.") from error
