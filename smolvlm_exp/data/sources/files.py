"""Your own pairs: a folder with JSONL, JSON, CSV or Parquet beside its pictures, or one that `save_to_disk` wrote.

Columns may be spelt in any of the ways that `formats.py` lists; picture paths count from the folder and
stay inside it.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.formats import EXPECTED, VERSION, conversation, features, has_known_format, row_images
from smolvlm_exp.data.images import Entry, ImageError, locate
from smolvlm_exp.data.loading import convert, files_digest, first_line, hold_out, load_saved, select_split, undecoded
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import json_lines

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

Rows = list[dict[str, Any]]
ORIGIN = "origin"  # the column that says where a row was read


@dataclass
class Config(DataConfig):
    """A folder, and which of its files holds the pairs."""

    folder: str = MISSING  # picture paths in the rows count from here
    rows: str | None = None  # the file with the pairs; null: train.* and test.*, or the only data file there is
    test_fraction: float = 0.1  # share held out, by picture, where there is no test file


def load(config: Config, split: str) -> "Dataset":
    """The rows of a split. A picture that is missing or outside the folder is its row's problem, not an error here.

    Raises:
        RequestError: no folder, no file, a file that cannot be parsed, or columns in no known spelling.
    """
    folder = Path(config.folder).expanduser()
    if not folder.is_dir():
        raise RequestError(f"data.folder={config.folder}: there is no such folder.")
    saved = None if config.rows else load_saved(folder)
    if saved:
        splits = {name: from_table(rows, folder, str(folder)) for name, rows in saved.items()}
    else:
        splits = {name: from_files(files, folder) for name, files in find(folder, config.rows).items()}
    if "test" not in splits and "train" in splits:
        splits |= hold_out(splits["train"], picture_keys(splits["train"]), config.test_fraction)
    return select_split(splits, split)


def find(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """The files of each split: the named one, or train* and test*, or the only data file in the folder."""
    if name:
        if not (folder / name).is_file():
            raise RequestError(f"data.rows={name}: there is no such file in {folder}.")
        return {"train": [folder / name]}
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    named = {split: [path for path in files if path.stem.lower().startswith(split)] for split in ("train", "test")}
    if all(named.values()):
        return named
    if len(files) == 1:
        return {"train": files}
    found = ", ".join(path.name for path in files) or f"no {', '.join(SUFFIXES)} file"
    raise RequestError(
        f"data.folder={folder} holds {found}: set data.rows to the file with the pairs, or have train.* and test.*."
    )


def from_files(files: list[Path], folder: Path) -> "Dataset":
    """The rows of one split's files, in the normal form."""
    from datasets import Dataset, Features, Value, load_dataset
    from datasets.exceptions import DatasetsError

    where = ", ".join(path.name for path in files)
    if all(path.suffix.lower() == ".parquet" for path in files):
        try:
            table = load_dataset("parquet", data_files=[str(path) for path in files], split="train")
        except (OSError, ValueError, DatasetsError) as error:
            raise RequestError(f"{where} cannot be read as Parquet: {first_line(error)}") from error
        return from_table(table, folder, where)
    rows = [row for path in files for row in parse(path)]
    require({key for row in rows for key in row} - {ORIGIN}, where)
    kwargs = {"rows": rows, "folder": folder, "stamp": f"{VERSION} {files_digest(map(row_images, rows), folder)}"}
    columns = Features({**features(), ORIGIN: Value("string")})
    return Dataset.from_generator(generate, features=columns, gen_kwargs=kwargs)


def from_table(table: "Dataset", folder: Path, where: str) -> "Dataset":
    """The rows of an Arrow table, in the normal form."""
    require(set(table.column_names), where)
    columns = [name for name in ("image", "images") if name in table.column_names]
    seen = files_digest((row_images(row) for row in undecoded(table, columns)), folder)
    rows = convert(table, to_row, folder=folder, stamp=seen)
    return rows.add_column(ORIGIN, [f"{where} row {i}" for i in range(len(rows))])


def require(columns: set[str], where: str) -> None:
    """Refuse columns in no known spelling, naming those that were found."""
    if not has_known_format(columns):
        found = ", ".join(sorted(columns)) or "none"
        raise RequestError(f"{where} has the columns {found}. Expected: {EXPECTED}.")


def generate(rows: Rows, folder: Path, stamp: str) -> Iterator[dict[str, Any]]:
    """Rows in the normal form, one by one, as `Dataset.from_generator` stores them."""
    for row in rows:
        yield {**to_row(row, folder, stamp), ORIGIN: row[ORIGIN]}


def to_row(row: dict[str, Any], folder: Path, stamp: str) -> dict[str, Any]:
    """One row in the normal form; `problem` says what is wrong with it.

    `stamp` is unused here: `datasets` keys its cache by the arguments, and must notice a picture that was replaced.
    """
    try:
        found = row_images(row)
        made = {"images": located(found, folder), **conversation(row, len(found)), "problem": ""}
        json.dumps(made, ensure_ascii=False, default=repr).encode()
        return made
    except UnicodeEncodeError:
        problem = "its text holds half a character (a lone surrogate), which no UTF-8 text can"
    except ValueError as error:  # PictureError is one
        problem = str(error).encode(errors="replace").decode()
    except (TypeError, AttributeError, KeyError) as error:  # rows are other people's: whatever has an unknown form
        problem = f"it has a form that is not known ({type(error).__name__}: {error})"
    return {"images": [], "prompt": [], "chosen": [], "rejected": [], "problem": problem}


def located(entries: list[Any], folder: Path) -> list[Entry]:
    """A row's pictures with absolute paths. Raises PictureError, which says which of them is wrong."""
    images = []
    for number, entry in enumerate(entries, start=1):
        try:
            images.append(locate(entry, folder))
        except ImageError as error:
            raise ImageError(f"image {number} {error}") from error
    return images


def picture_keys(rows: "Dataset") -> list[str]:
    """What each row's first picture is, so that rows over the same picture are held out together."""
    keys = []
    for row in undecoded(rows, ["images", "prompt"]):
        first: Entry = row["images"][0] if row["images"] else {"bytes": str(row["prompt"]).encode()}
        keys.append(hashlib.sha256(first["bytes"] or Path(first["path"]).read_bytes()).hexdigest())
    return keys


def parse(path: Path) -> Rows:
    """The rows of a JSONL, JSON or CSV file.

    Raises:
        RequestError: it is malformed; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path.name} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    if path.suffix.lower() == ".csv":
        return parse_csv(text, path.name)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        return parse_json(text, path.name)
    return parse_lines(text, path.name)  # many a .json file holds one object a line


def parse_lines(text: str, name: str) -> Rows:
    """One JSON object a line; empty lines are passed over."""
    rows = []
    for number, line in json_lines(text):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{name} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise RequestError(
                f"{name} line {number} is {type(row).__name__}, not an object {{...}} with a row's columns."
            )
        rows.append({**row, ORIGIN: f"{name} line {number}"})
    return rows


def parse_json(text: str, name: str) -> Rows:
    """A JSON list of objects."""
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{name} is not JSON: {error}") from error
    strange = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if strange is not None:
        raise RequestError(f"{name}: item {strange} of the list is not an object {{...}} with a row's columns.")
    return [{**row, ORIGIN: f"{name} item {index}"} for index, row in enumerate(rows)]


def parse_csv(text: str, name: str) -> Rows:
    """Comma-separated values under a header line; every row has the header's number of fields."""
    reader = csv.DictReader(io.StringIO(text), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise RequestError(
                    f"{name} line {reader.line_num} has not as many fields as its header; "
                    "put answers that hold commas or line breaks in double quotes."
                )
            rows.append({**row, ORIGIN: f"{name} line {reader.line_num}"})
    except csv.Error as error:
        raise RequestError(f"{name} is not CSV after line {reader.line_num}: {error}") from error
    return rows
