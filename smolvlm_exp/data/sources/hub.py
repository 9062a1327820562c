"""Any dataset of the Hub, or a local copy of one, whose columns are those of one of the formats in `formats.py`.

Only the files that a split or slice needs are fetched (repository.py). Images are in the rows themselves: a row of the
Hub must not name one of the user's files.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.formats import KEY, normal_features, normal_row, require_known_format, with_key
from smolvlm_exp.data.loading import convert, hold_out, load_saved, require_embedded, select_split, split_names
from smolvlm_exp.data.repository import Repository, find_repository
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.hub import Provenance

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Config(DataConfig):
    """A repository of the Hub, and what in it is read."""

    id: str = MISSING  # OWNER/NAME on the Hub, or a local folder with a copy of it
    revision: str | None = None  # branch, tag or commit on the Hub; null: the newest
    config_name: str | None = None  # where the dataset has several configurations: one of them
    rows: Any = None  # the files with the rows, a pattern or a list of them; null: as the dataset's card says
    columns: dict[str, str | None] = field(default_factory=dict)  # its names to ours: {caption: answer}; null: unread
    test_fraction: float = 0.1  # share of the rows of `train` held out, by image, where there is no split `test`


def load(config: Config, split: str) -> "Dataset":
    """The rows of a split or slice; without a split `test`, a part of those that `data.train` names are held out."""
    saved = load_saved(Path(config.id).expanduser())
    splits, rows = (saved, partial(select_split, saved)) if saved else splits_of(config)
    held_out = "test" not in splits and split_names(config.test) == {"test"}
    wanted = split_names(config.train) | (set() if held_out else split_names(config.test))
    if unknown := ", ".join(sorted(wanted - set(splits))):  # of both, before any is fetched
        raise RequestError(f"data.id={config.id} has no split {unknown}. It has {', '.join(splits)}.")
    if not held_out:
        return read(config, rows(split), to_row)
    keyed = read(config, rows(config.train), keyed_row)
    parts = hold_out(keyed.remove_columns(KEY), keyed[KEY][:], config.test_fraction)
    return parts["train"] if split == config.train else select_split(parts, split)


def splits_of(config: Config) -> tuple[Collection[str], Callable[[str], "Dataset"]]:
    """The names of a repository's splits, and what fetches rows of them."""
    repository = find(config)
    return repository.splits, repository.rows


def find(config: Config) -> Repository:
    """
    Raises:
        RequestError: there is no such repository, or it cannot be reached.
    """
    files = [config.rows] if isinstance(config.rows, str) else config.rows
    return find_repository(config.id, config.revision, config.config_name, files)


def provenance(config: Config) -> Provenance:
    """Of the rows."""
    if load_saved(Path(config.id).expanduser()):
        return Provenance(config.id)
    repository = find(config)
    return Provenance(config.id, repository.commit, repository.license)


def read(config: Config, rows: "Dataset", convert_row: Any) -> "Dataset":
    """Rows in the normal form."""
    where, given = f"data.id={config.id}", set(rows.column_names)
    if unknown := ", ".join(sorted(config.columns.keys() - given)):
        raise RequestError(f"data.columns: {where} has no column {unknown}; it has {', '.join(sorted(given))}.")
    renamed = {theirs: ours for theirs, ours in config.columns.items() if ours}
    unread = config.columns.keys() | set(renamed.values())
    rows = rows.remove_columns(sorted((unread - renamed.keys()) & given)).rename_columns(renamed)
    columns = set(rows.column_names)
    require_known_format(columns, where, " Other names are told by data.columns, as 'data.columns={caption: answer}'.")
    types = normal_features(columns, *([KEY] if convert_row is keyed_row else []))
    return convert(rows, convert_row, columns=types, num_proc=config.num_proc)


def to_row(row: dict[str, Any]) -> dict[str, Any]:
    return normal_row(row, require_embedded)


def keyed_row(row: dict[str, Any]) -> dict[str, Any]:
    return with_key(to_row(row), row)
