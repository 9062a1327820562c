"""Your own rows: a folder with images and JSONL, JSON, CSV or Parquet, or one that `save_to_disk` wrote.

A row has a pair of answers, or what is known of its image (truth.py), or both, in columns of any of the formats in
`messages.py`; image paths count from the folder and stay inside it.
"""

import csv
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.formats import KEY, normal_features, normal_row, require_known_format, row_images, with_key
from smolvlm_exp.data.images import Entry, ImageError, locate
from smolvlm_exp.data.loading import (
    convert,
    files_digest,
    first_cause,
    hold_out,
    is_saved,
    json_objects,
    load_saved,
    read_text,
    select_split,
)
from smolvlm_exp.utils.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
CHECKED = 1000  # rows, before they are loaded
CHECKED_BYTES = 2**27  # of a file; reading a larger one takes seconds
LONGEST_NAME = 1024  # characters; what is longer holds an image itself
PAIRS = "pairs.jsonl"  # as task=mine writes it, beside its other files

ORIGIN = "origin"  # the column that says where a row was read


@dataclass
class Config(DataConfig):
    """A folder, and which of its files holds the rows."""

    folder: str = MISSING  # image paths in the rows count from here
    rows: str | None = None  # the file with the rows; null: train.* and test.*, pairs.jsonl, or the only data file
    test_fraction: float = 0.1  # share held out, by image, where there is no test file


def load(config: Config, split: str) -> "Dataset":
    """The rows of a split. A missing image, or one outside the folder, is its row's problem, not an error here."""
    folder = Path(config.folder).expanduser()
    if not folder.is_dir():
        raise RequestError(f"data.folder={config.folder}: there is no such folder.")
    saved = None if config.rows else load_saved(folder)
    found: Mapping[str, Any] = saved or find(folder, config.rows)
    if not saved and not config.rows:
        log_files(found)
    held_out = "train" in found and "test" not in found
    converter = Converter(folder, keyed_row if held_out else to_row, config.num_proc)
    if saved:
        splits = {name: converter.from_table(rows, str(folder)) for name, rows in saved.items()}
    else:
        splits = {name: converter.from_files(files) for name, files in found.items()}
    if held_out:
        keys = splits["train"][KEY][:]
        splits = {name: rows.remove_columns(KEY) for name, rows in splits.items()}
        splits |= hold_out(splits["train"], keys, config.test_fraction)
    return select_split(splits, split)


def check(config: Config) -> None:
    """Before anything is imported that takes seconds: whether there are rows, and their images are not empty.

    Of rows in text files, and no more than `CHECKED`: all is validated once it is loaded.

    Raises:
        RequestError: naming the file or the row.
    """
    folder = Path(config.folder).expanduser()
    if is_saved(folder) and not config.rows:
        return
    for path in (path for files in find(folder, config.rows).values() for path in files):
        large = path.stat().st_size > CHECKED_BYTES
        if large or path.suffix.lower() == ".parquet" or config.on_bad_row != "error":
            continue
        parse = csv_rows if path.suffix.lower() == ".csv" else json_objects
        for origin, row in islice(parse(read_text(path, "data.folder"), path.name), CHECKED):
            for image in row_images(row):
                name = image.get("path") if isinstance(image, dict) else image
                file = folder / name if isinstance(name, str) and len(name) < LONGEST_NAME else folder
                if file.is_file() and not file.stat().st_size:
                    raise RequestError(f"{origin}: the image {name} is an empty file.")


def find(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """The files of each split: the named one, or train* and test*, or pairs.jsonl, or the only data file there is."""
    if name:
        if not (folder / name).is_file():
            raise RequestError(f"data.rows={name}: there is no such file in {folder}.")
        return {"train": [inside(folder, folder / name)]}
    names = (name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in SUFFIXES)  # of many images
    files = sorted(inside(folder, folder / name) for name in names)
    named = {
        split: [path for path in files if re.fullmatch(rf"{split}(-\d+(-of-\d+)?)?", path.stem, re.IGNORECASE)]
        for split in ("train", "test")
    }
    if all(named.values()):
        return named
    files = [path for path in files if path.name == PAIRS] or files
    if len(files) == 1:
        return {"train": files}
    listed = ", ".join(path.name for path in files) or f"no {', '.join(SUFFIXES)} file"
    raise RequestError(
        f"data.folder={folder} holds {listed}: set data.rows to the file with the rows, or name two train.* and test.*."
    )


def log_files(files: Mapping[str, list[Path]]) -> None:
    names = (f"{split} from {', '.join(path.name for path in paths)}" for split, paths in files.items())
    log.info(f"data: {'; '.join(names)}")


def inside(folder: Path, path: Path) -> Path:
    """The path; RequestError where it is no file, or where it, or a link in it, leads out of the data's folder."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RequestError(f"data.folder: {path} lies outside of it, or is a link that leads out: put the file there.")
    if not path.is_file():
        raise RequestError(f"data.folder: {path} is no file that can be read.")
    return path


@dataclass(frozen=True)
class Converter:
    """Files and tables -> rows in the normal form."""

    folder: Path
    to_row: Callable[..., dict[str, Any]]
    num_proc: int | None

    def from_files(self, files: list[Path]) -> "Dataset":
        """The rows of one split's files."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        where = ", ".join(path.name for path in files)
        if all(path.suffix.lower() == ".parquet" for path in files):
            try:
                names = [str(path) for path in files]
                table = load_dataset("parquet", files_digest(names, Path()), data_files=names, split="train")
            except (OSError, ValueError, DatasetsError) as error:
                raise RequestError(f"{where} cannot be read as Parquet: {first_cause(error)}") from error
            return self.from_table(table, where)
        if any(path.suffix.lower() == ".parquet" for path in files):
            raise RequestError(
                f"data.folder={self.folder}: {where} are one split in two formats; name one of them in data.rows."
            )
        rows = []
        for path in files:
            parse = csv_rows if path.suffix.lower() == ".csv" else json_objects
            for origin, row in parse(read_text(path, "data.folder"), path.name):
                rows.append({**{key.strip().lower(): value for key, value in row.items()}, ORIGIN: origin})
        require_rows(rows, where)
        columns = {key for row in rows for key in row} - {ORIGIN}
        lists = [key for key, value in rows[0].items() if isinstance(value, list)] if len(rows) == 1 else []
        advice = f" Its rows may be those in its `{lists[0]}`: save that list alone." if lists else ""
        require_known_format(columns, where, advice)
        return self.convert(rows, columns, ORIGIN)

    def from_table(self, table: "Dataset", where: str) -> "Dataset":
        """The rows of an Arrow table."""
        require_rows(table, where)
        require_known_format(set(table.column_names), where)
        rows = self.convert(table, set(table.column_names))
        return rows.add_column(ORIGIN, [f"{where} row {i}" for i in range(len(rows))])

    def convert(self, rows: "Dataset | list[dict[str, Any]]", given: set[str], *more: str) -> "Dataset":
        """`more`: columns of text."""
        types = normal_features(given, *more, *([KEY] if self.to_row is keyed_row else []))
        return convert(rows, self.to_row, self.folder, types, self.num_proc)


def require_rows(rows: Sized, where: str) -> None:
    if not len(rows):
        raise RequestError(f"{where} has no rows.")


def keyed_row(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    return with_key(to_row(row, folder), row)


def to_row(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One row in the normal form, and where it was read; `problem` says what is wrong with it."""
    return {**normal_row(row, lambda entries: located(entries, folder)), ORIGIN: row.get(ORIGIN)}


def located(entries: list[Any], folder: Path) -> list[Entry]:
    """A row's images with absolute paths. Raises ImageError, which names the bad one."""
    images = []
    for number, entry in enumerate(entries, start=1):
        try:
            images.append(locate(entry, folder))
        except ImageError as error:
            raise ImageError(f"image {number} {error}") from error
    return images


def csv_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a CSV file with a header line, each after its place in the file.

    Fields may also be separated by semicolons, as spreadsheets of many countries write them, or by tabs.
    """
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise RequestError(
                    f"{name} line {reader.line_num} has more or fewer fields than its header; "
                    "put answers that contain commas or line breaks in double quotes."
                )
            yield f"{name} line {reader.line_num}", row
    except csv.Error as error:
        raise RequestError(f"{name} is not CSV after line {reader.line_num}: {error}") from error
