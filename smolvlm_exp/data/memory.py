"""Rows in memory, as a notebook has them -> a folder that `data=files` reads, and that a resumed run finds again."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import xxhash

from smolvlm_exp.utils.errors import RequestError
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
    folder.mkdir(parents=True, exist_ok=True)
    splits = {name: as_dataset(rows, name) for name, rows in (("train", train), ("test", test)) if rows is not None}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unnamed = Path(scratch) / "rows"
        DatasetDict(splits).save_to_disk(unnamed)
        contents = b"".join(xxhash.xxh3_128_digest(file.read_bytes()) for file in sorted(unnamed.rglob("*.arrow")))
        named = folder / xxhash.xxh3_128_hexdigest(contents)[:12]
        if not named.exists():
            shutil.move(unnamed, named)
    return named.absolute()


def as_dataset(rows: "Rows", name: str) -> "Dataset":
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    if isinstance(rows, Dataset):
        return rows.flatten_indices() if rows._indices else rows
    try:
        return Dataset.from_list([with_images(row) for row in rows])
    except (OSError, TypeError, ValueError) as error:  # pyarrow's errors are among the last two
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
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    try:
        return Image.open(Path(image).expanduser())
    except (OSError, TypeError) as error:
        raise RequestError(f"an image cannot be read: {error}") from error
