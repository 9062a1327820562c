"""Loading that the sources share: rows converted to the normal form, splits and slices."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.formats import row_images
from smolvlm_exp.data.images import ImageError
from smolvlm_exp.data.messages import VERSION, features
from smolvlm_exp.data.parallel import hash_of, map_rows, worker_count
from smolvlm_exp.utils.errors import RequestError, first_line
from smolvlm_exp.utils.files import json_lines, read_json

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

LINE = "json"  # the column of rows that are no dataset


def select_columns(rows: "Dataset", columns: list[str], where: str) -> "Dataset":
    """The rows with these columns alone."""
    missing = ", ".join(sorted(set(columns) - set(rows.column_names)))
    if missing:
        raise RequestError(f"{where} has no column {missing}; it has {', '.join(rows.column_names)}.")
    return rows.select_columns(columns)


def first_cause(error: Exception) -> str:
    """What `datasets` raises often says only where it failed; the error behind it says why."""
    return first_line(error.__cause__ or error)


def load_saved(folder: Path) -> dict[str, "Dataset"] | None:
    """The splits of what `save_to_disk` wrote (a lone dataset is `train`); None when the folder is something else."""
    from datasets import DatasetDict, load_from_disk

    if not is_saved(folder):
        return None
    refuse_links_out(folder)
    try:
        outside = [path for path in saved_files(folder) if not path.resolve().is_relative_to(folder.resolve())]
        saved = None if outside else load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{folder} cannot be read as what save_to_disk writes: {first_cause(error)}.") from error
    if saved is None:
        raise RequestError(f"{outside[0]} lies outside of {folder}, whose own files name it.")
    return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved_files(folder: Path) -> Iterator[Path]:
    """The files of rows that a folder of `save_to_disk` names, wherever they are."""
    for split in read_json(folder / "dataset_dict.json").get("splits", [""]):
        listed = read_json(folder / split / "state.json").get("_data_files", [])
        yield from (folder / split / file["filename"] for file in [{"filename": ""}, *listed])


def refuse_links_out(folder: Path) -> None:
    """Refuse a data set with a link that leads out of its folder: rows could name any file by it.

    And with a pipe or a device, which would be read without end.
    """
    root = folder.resolve()
    for parent, folders, files in os.walk(root):
        for path in (os.path.join(parent, name) for name in (*folders, *files)):
            if os.path.islink(path) and not Path(path).resolve().is_relative_to(root):
                raise RequestError(f"{path} is a link that leads out of {folder}: put the file itself there.")
            if not os.path.isfile(path) and not os.path.isdir(path) and os.path.exists(path):
                raise RequestError(f"{path} is a pipe or a device, and no file: remove it.")


def require_embedded(images: list[Any]) -> list[Any]:
    """Images whose bytes are in the dataset itself. A row of the Hub must not name one of the user's files."""
    for image in images:
        if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes) or not image["bytes"]:
            raise ImageError("is not in the dataset, which only names it; data=files reads images from a folder")
    return images


def convert(
    rows: "Dataset | list[dict[str, Any]]",
    to_row: Callable[..., dict[str, Any]],
    folder: Path | None = None,
    columns: "Features | None" = None,
    num_proc: int | None = None,
) -> "Dataset":
    """Every row through `to_row`, which returns it in the normal form; cached on disk by content.

    Args:
        rows: a dataset, of which no image is decoded, or a list of what JSON can hold, where a column may mix types.
        to_row: a module's function. It takes a row, and `folder` where that is given.
        folder: what the rows' image paths count from. The cache then also depends on these files.
        columns: what `to_row` returns, if not the columns of `features`.
        num_proc: data.num_proc.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable

    columns, name = columns or features(), f"{to_row.__module__}.{to_row.__qualname__}"
    if isinstance(rows, list):
        lines = [json.dumps(row) for row in rows]
        names: Iterator[Any] = (entry for row in rows for entry in row_images(row))
        content = hash_of(lines)
        table = Dataset(InMemoryTable.from_pydict({LINE: lines}), fingerprint=content)
    else:
        stored = files_digest((file["filename"] for file in rows.cache_files), Path())
        content, names, table = f"{rows._fingerprint} {stored}", image_paths(rows), rows
    files = [str(folder), str(folder.absolute()), files_digest(names, folder)] if folder else None
    key = hash_of("converted", VERSION, name, files, content, str(columns))
    workers = worker_count(num_proc, len(rows), least=512)
    return map_rows(table, RowConverter(to_row, folder, columns), columns, key, workers, "reading rows")


class RowConverter:
    """A batch of rows, as lines of JSON or as a dataset's columns -> the same rows through `to_row`."""

    def __init__(self, to_row: Callable[..., dict[str, Any]], folder: Path | None, columns: "Features") -> None:
        self.to_row, self.folder, self.schema = to_row, folder, columns.arrow_schema

    def __call__(self, table: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        given = map(json.loads, table[LINE].to_pylist()) if table.column_names == [LINE] else table.to_pylist()
        rows = [self.to_row(row, self.folder) if self.folder else self.to_row(row) for row in given]
        for image in (image for row in rows for image in row["images"]):
            if image["bytes"]:  # else `datasets` drops the bytes where the working folder has a file of that name
                image["path"] = None
        return pa.Table.from_pylist(rows, schema=self.schema)


def files_digest(names: Iterable[Any], folder: Path) -> str:
    """A digest of the size and times of every name that is a file's, so that a changed one is noticed.

    Of its content's time and of the change of anything about it, which nobody sets back: `datasets` goes by the first
    alone, which archives and copies keep.

    Args:
        names: rows' images in any form; those that are no path are passed over.
    """
    digest, root = hashlib.sha256(), str(folder)
    for entry in names:
        name = entry.get("path") if isinstance(entry, dict) else entry
        try:
            status = os.stat(os.path.join(root, name)) if isinstance(name, str) else None
        except (OSError, ValueError):  # ValueError: a zero byte in it
            status = None
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns};" if status else "-;"
        digest.update(stamp.encode())
    return digest.hexdigest()


def image_paths(rows: "Dataset") -> Iterator[str]:
    """The paths in a dataset's `image` and `images` columns, without reading the bytes of those that are embedded."""
    from pyarrow import types

    columns = [name for name in ("image", "images") if name in rows.column_names]
    for batch in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for column in (chunk for name in columns for chunk in batch[name].chunks):
            while types.is_list(column.type) or types.is_large_list(column.type):
                column = column.flatten()
            if types.is_struct(column.type):  # {"bytes", "path"}
                parts = dict(zip((part.name for part in column.type), column.flatten(), strict=True))
                column = parts["path"].filter(parts["bytes"].is_null()) if {"bytes", "path"} <= parts.keys() else column
            if types.is_string(column.type) or types.is_large_string(column.type):
                yield from column.to_pylist()


def undecoded(rows: "Dataset", columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some columns of every row, images as {"bytes", "path"}."""
    for batch in rows.select_columns(columns).with_format("arrow").iter(batch_size=100):
        yield from batch.to_pylist()


def read_text(path: Path, key: str) -> str:
    """The text of the file that the setting `key` names."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise RequestError(f"{key}: {path} is a pipe or a device, and no file.")
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{key}: {path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except OSError as error:
        raise RequestError(f"{key}: {path} cannot be read: {error.strerror}.") from error


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    except RecursionError as error:
        raise RequestError(f"{where} is nested too deep to be read.") from error


def json_objects(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list or of JSON Lines, whatever the file's suffix, each after its place in the file."""
    entries: Iterable[tuple[str, Any]] = (
        (f"{name} line {n}", parse_json(line, f"{name} line {n}")) for n, line in json_lines(text)
    )
    _, first = next(json_lines(text), (0, ""))
    if first.lstrip().startswith("[") or is_cut(first):
        whole = parse_json(text, name)
        if not isinstance(whole, list):
            raise RequestError(f"{name} is one JSON object over several lines, not a list of rows or one row per line.")
        entries = ((f"{name} entry {number}", entry) for number, entry in enumerate(whole, start=1))
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise RequestError(f"{where} is {type(entry).__name__}, not an object {{...}} with a row's columns.")
        yield where, entry


def is_cut(line: str) -> bool:
    """Whether a line is the beginning of JSON that goes on below it."""
    return line.strip() in ("{", "[") or line.rstrip().endswith((",", "{", "[", ":"))


def select_split(splits: dict[str, "Dataset"], split: str) -> "Dataset":
    """The rows that a split or slice names: `train`, `test[:20]`, `train[10%:]`, `train+test`, as in `load_dataset`."""
    from datasets import concatenate_datasets

    spans = spans_of(split, {name: len(rows) for name, rows in splits.items()})
    chosen = [splits[name].select(range(start, stop)) for name, start, stop in spans]
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def spans_of(split: str, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    """(split, first row, row after the last) of each part of a split or slice, in splits of these lengths."""
    from datasets import ReadInstruction

    if unknown := ", ".join(sorted(split_names(split) - lengths.keys())):
        raise RequestError(
            f"There is no split {unknown}, but {', '.join(lengths)}: data.train and data.test choose them, as "
            f"data.train={next(iter(lengths))}."
        )
    try:
        spans = ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise RequestError(
            f"Split {split!r}: {first_cause(error)} Use {', '.join(lengths)}, or a slice such as train[:6%]."
        ) from error
    return [
        (span.splitname, span.from_ or 0, lengths[span.splitname] if span.to is None else span.to) for span in spans
    ]


def split_names(split: str) -> set[str]:
    """`train[:6%]+test` -> train, test."""
    return {part.partition("[")[0].strip() for part in split.split("+")}


def hold_out(rows: "Dataset", keys: list[str], fraction: float) -> dict[str, "Dataset"]:
    """Split rows into `train` and `test`: the same rows on every machine, whatever their order.

    Args:
        keys: the image of each row: rows that share a key go to the same side, so that no test image was trained on.
        fraction: the share of rows to hold out, at least.
    """
    if not 0 < fraction < 1:
        raise RequestError(f"data.test_fraction={fraction} should be between 0 and 1.")
    row_counts = Counter(keys)
    if len(row_counts) < 2:
        raise RequestError(
            f"{len(keys)} rows over {len(row_counts)} different images: none can be held out. "
            "Add rows, or a test file next to the train file."
        )
    shuffled = sorted(row_counts, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    test, test_rows = set(), 0
    for key in shuffled[:-1]:  # one image at least stays for training
        if test_rows < fraction * len(keys):
            test.add(key)
            test_rows += row_counts[key]
    held_out = [key in test for key in keys]
    return {
        "train": rows.select([index for index, held in enumerate(held_out) if not held]),
        "test": rows.select([index for index, held in enumerate(held_out) if held]),
    }
