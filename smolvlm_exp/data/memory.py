"""Rows in memory, as a notebook has them -> a folder that `data=files` reads, and that a resumed run finds again."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import xxhash

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import fsync
from smolvlm_exp.utils.paths import OUTPUTS

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

Rows: TypeAlias = "Dataset | Sequence[Mapping[str, Any]]"


def save_rows(train: "Rows | None", test: "Rows | None") -> Path:
    """The folder, named by what is in it: the same rows are written once.

    Args:
        train, test: as of `smolvlm_exp.train`; None: there are none.

    Raises:
        RequestError: they cannot be stored as a table.
    """
    from datasets import DatasetDict

    folder = OUTPUTS / "rows"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror}.") from error
    splits = {name: as_dataset(rows, name) for name, rows in (("train", train), ("test", test)) if rows is not None}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unnamed = Path(scratch) / "rows"
        DatasetDict(splits).save_to_disk(unnamed)
        for path in (*unnamed.rglob("*"), unnamed):
            fsync(path)
        named = folder / contents_digest(unnamed)
        if contents_digest(named) != named.name:  # it is not there yet, or was changed since
            shutil.rmtree(named, ignore_errors=True)
            try:
                unnamed.rename(named)
            except OSError:
                if contents_digest(named) != named.name:  # no other process has just written the same
                    raise
            fsync(folder)
    return named.absolute()


def contents_digest(folder: Path) -> str:
    """Of the rows of each split in what `save_to_disk` wrote."""
    files = sorted(folder.rglob("*.arrow"))
    parts = [f"{file.relative_to(folder)} {xxhash.xxh3_128_hexdigest(file.read_bytes())}" for file in files]
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())[:12]


def as_dataset(rows: "Rows", name: str) -> "Dataset":
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    if isinstance(rows, Dataset):
        if rows.format["type"] == "custom":
            raise RequestError(f"the {name} rows have a transform, which is not stored: apply it by `map`.")
        return rows.flatten_indices() if rows._indices else rows
    try:
        return Dataset.from_list([with_images(row) for row in rows])
    except (OSError, TypeError, ValueError, AttributeError) as error:  # pyarrow's errors are among them
        raise RequestError(f"the {name} rows cannot be stored: {error}") from error


def with_images(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its images read, in the column `images`."""
    given = row.get("images") or row.get("image") or []
    images = [read_image(image) for image in (given if isinstance(given, list | tuple) else [given])]
    return {**{key: value for key, value in row.items() if key not in ("image", "images")}, "images": images}


def read_image(image: "Image | str | Path") -> "Image":
    """
    Raises:
        RequestError: it is no image.
    """
    from PIL import Image, ImageOps

    try:
        if not isinstance(image, Image.Image):
            return Image.open(Path(image).expanduser())
        # `datasets` stores an image's file wherever it names one, and of others neither the orientation nor all pixels
        return image if is_its_file(image) else ImageOps.exif_transpose(image)
    except (OSError, TypeError, Image.DecompressionBombError) as error:
        raise RequestError(f"an image cannot be read: {error}") from error


def is_its_file(image: "Image") -> bool:
    """Whether an image is still what the file holds that it was read from."""
    from PIL import Image

    name = getattr(image, "filename", "")
    if not name or not os.path.isfile(name):
        return False
    with Image.open(name) as file:
        try:
            return bool(file == image)
        except (ValueError, AttributeError, AssertionError):  # it was closed
            return True
