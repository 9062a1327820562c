"""What the sources share: the Hub or a local copy of it, rows brought into the normal form, slices, held-out rows."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.formats import VERSION, features
from smolvlm_exp.data.images import ImageError, locate
from smolvlm_exp.utils.errors import RequestError, first_line
from smolvlm_exp.utils.files import json_lines

if TYPE_CHECKING:
    from datasets import Dataset, Features


def fetch(id: str, revision: str | None, split: str, columns: set[str]) -> "Dataset":
    """These columns of a dataset on the Hub, or of a local copy of it (a clone, or written by `save_to_disk`).

    Args:
        id: the Hub's name, or the folder.
        split: a split or a slice of one.

    Raises:
        RequestError: it cannot be reached, has no such split, or lacks a column.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    folder = Path(id).expanduser()
    local = folder.is_dir()
    if not local and id.startswith((".", "/", "~")):
        raise RequestError(f"data.id={id}: there is no such folder.")
    saved = load_saved(folder)
    if saved:
        rows = select_split(saved, split)
    else:
        try:
            where = {"path": str(folder)} if local else {"path": id, "revision": revision}
            rows = load_dataset(**where, split=split)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: a script, which nobody runs
            hint = "" if local else " Without a network, set data.id to a folder that holds a copy of it."
            raise RequestError(f"data.id={id}, split {split}: {first_cause(error)}.{hint}") from error
    return select_columns(rows, sorted(columns), f"data.id={id}", " For data in other columns use data=files.")


def select_columns(rows: "Dataset", columns: list[str], where: str, hint: str = "") -> "Dataset":
    """The rows with these columns alone."""
    missing = ", ".join(sorted(set(columns) - set(rows.column_names)))
    if missing:
        raise RequestError(f"{where} has no column {missing}; it has {', '.join(rows.column_names)}.{hint}")
    return rows.select_columns(columns)


def first_cause(error: Exception) -> str:
    """What `datasets` raises often says nothing but where; the error behind it says what."""
    return first_line(error.__cause__ or error)


def load_saved(folder: Path) -> dict[str, "Dataset"] | None:
    """The splits of what `save_to_disk` wrote (a lone dataset is `train`); None when the folder is something else."""
    from datasets import DatasetDict, load_from_disk

    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    saved = load_from_disk(folder)
    return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}


def require_embedded(images: list[Any]) -> list[Any]:
    """Images that lie in the data set itself: of a row that names a file instead, nobody knows whose file it is."""
    for image in images:
        if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes) or not image["bytes"]:
            raise ImageError("is not in the data set, which only names it; data=files reads images beside rows")
    return images


def convert(rows: "Dataset", to_row: Callable[..., dict[str, Any]], stamp: str = "", **kwargs: Any) -> "Dataset":
    """Every row through `to_row(row, **kwargs)`, which returns it in the normal form; kept on disk by content.

    The rows are read as plain Arrow, where images are {"bytes", "path"}: nothing is decoded. `Image(decode=False)`
    would say the same of a list of images only after copying the whole data set.

    `stamp` changes when files that the rows name do; see `files_digest`.
    """
    plain = rows.with_format("arrow")
    converted = plain.map(
        _convert_batch,
        fn_kwargs={"to_row": to_row, "kwargs": kwargs, "key": f"{VERSION} {stamp}"},
        batched=True,
        batch_size=100,
        remove_columns=rows.column_names,
        features=features(),
        desc="rows",
    )
    return converted.with_format(None)


def _convert_batch(table: Any, to_row: Callable[..., dict[str, Any]], kwargs: dict[str, Any], key: str) -> dict:
    converted = [to_row(row, **kwargs) for row in table.to_pylist()]
    for image in (image for row in converted for image in row["images"] if image["bytes"]):
        image["path"] = None  # else `datasets` drops the bytes where the working folder has a file of that name
    return {name: [row[name] for row in converted] for name in features()}


def build(
    rows: list[Any], to_row: Callable[..., dict[str, Any]], columns: "Features", stamp: str, folder: Path
) -> "Dataset":
    """As `convert`, of rows in memory, in whose columns anything may stand."""
    from datasets import Dataset

    kwargs = {"rows": rows, "to_row": to_row, "folder": folder, "key": f"{VERSION} {stamp}"}
    return Dataset.from_generator(_build_rows, features=columns, gen_kwargs=kwargs)


def _build_rows(rows: list[Any], to_row: Callable[..., dict[str, Any]], folder: Path, key: str) -> Iterator[dict]:
    return (to_row(row, folder=folder) for row in rows)


def read_text(path: Path, key: str) -> str:
    """The text of the file that the setting `key` names."""
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


def json_objects(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each object stands, and the object: of JSON Lines (many a .json file is that too) or of a JSON list."""
    if text.lstrip().startswith("[") and not name.lower().endswith(".jsonl"):
        entries = ((f"{name} entry {n}", entry) for n, entry in enumerate(parse_json(text, name), start=1))
    else:
        entries = ((f"{name} line {n}", parse_json(line, f"{name} line {n}")) for n, line in json_lines(text))
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise RequestError(f"{where} is {type(entry).__name__}, not an object {{...}} with a row's columns.")
        yield where, entry


def undecoded(rows: "Dataset", columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some columns of every row, images as {"bytes", "path"}."""
    for batch in rows.select_columns(columns).with_format("arrow").iter(batch_size=100):
        yield from batch.to_pylist()


def select_split(splits: dict[str, "Dataset"], split: str) -> "Dataset":
    """The rows that a split or slice names: `train`, `test[:20]`, `train[10%:]`, `train+test`, as upstream has it."""
    from datasets import ReadInstruction, concatenate_datasets

    try:
        spans = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except ValueError as error:
        raise RequestError(
            f"Split {split!r}: {first_cause(error)} Use {', '.join(splits)}, or a slice such as train[:6%]."
        ) from error
    chosen = []
    for span in spans:
        rows = splits[span.splitname]
        chosen.append(rows.select(range(span.from_ or 0, len(rows) if span.to is None else span.to)))
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def hold_out(rows: "Dataset", keys: list[str], fraction: float) -> dict[str, "Dataset"]:
    """Split rows into `train` and `test`, the same way on every machine and in whatever order they come.

    Args:
        keys: what each row is about (its image): rows that share a key go to the same side, so that no image that
            was trained on is tested on.
        fraction: the share of rows to hold out, at least.
    """
    if not 0 < fraction < 1:
        raise RequestError(f"data.test_fraction={fraction} should lie between 0 and 1.")
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    if len(members) < 2:
        raise RequestError(
            f"{len(keys)} rows over {len(members)} different images: none can be held out. "
            "Add rows, or put a test file beside the train file."
        )
    test: set[int] = set()
    shuffled = sorted(members, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    for key in shuffled[:-1]:  # one image at least stays for training
        if len(test) >= fraction * len(keys):
            break
        test.update(members[key])
    train = [index for index in range(len(keys)) if index not in test]
    return {"train": rows.select(train), "test": rows.select(sorted(test))}


def worker_count(requested: int | None, rows: int) -> int | None:
    """Processes for `rows` images: as many as requested; else one a core, where there is work enough."""
    count = requested or min(os.cpu_count() or 1, 16)
    return count if count > 1 and (requested or rows >= 2048) else None


def files_digest(rows: Iterable[list[Any]], folder: Path) -> str:
    """A digest of the size and time of every image that is a file, by which a changed one is noticed."""
    digest = hashlib.sha256()
    for entry in (entry for row in rows for entry in row):
        try:
            path = locate(entry, folder)["path"]
            status = Path(path).stat() if path else None
        except (ImageError, OSError):
            status = None
        digest.update(f"{status.st_size} {status.st_mtime_ns};".encode() if status else b"-;")
    return digest.hexdigest()
