"""A dataset repository, on the Hub or a local copy: which files hold a split, and fetching those that are needed.

`datasets` finds the files, by the repository's card and their names. Of Parquet the footers say which rows lie where,
so that a slice takes only the files, or the row groups, that hold it. What was found is kept beside the cache of
`datasets`: the same commit is not looked through again, and is there without a network.
"""

import glob
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolvlm_exp.data.loading import files_digest, first_cause, refuse_links_out, select_split, spans_of, split_names
from smolvlm_exp.data.parallel import hash_of
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import atomic_file, read_json, write_json
from smolvlm_exp.utils.hub import hub_errors, is_hub_id, is_offline
from smolvlm_exp.utils.units import format_bytes

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

VERSION = 1  # raise when another `Repository` is found for the same commit
THREADS = 8  # of one footer each
MOSTLY = 0.5  # the share of a file from which the whole of it is fetched


@dataclass(frozen=True)
class DataFile:
    path: str  # from the repository's root
    size: int  # bytes
    groups: list[int] | None = None  # of Parquet: the rows of each row group


@dataclass(frozen=True)
class Part:
    """Row groups of a file; None: all of it."""

    file: DataFile
    groups: tuple[int, ...] | None = None
    size: int = 0  # bytes


@dataclass(frozen=True)
class Repository:
    id: str  # on the Hub, or a folder
    commit: str | None  # None: it is a folder
    license: str | None
    format: str  # as `load_dataset` names it: parquet, json, csv, imagefolder, ...
    splits: dict[str, list[DataFile]]
    found: str  # on which day

    def rows(self, split: str) -> "Dataset":
        """A slice of splits that there are, once what of it is not on this disk has been fetched.

        Raises:
            RequestError: its files cannot be fetched or read.
        """
        from datasets import concatenate_datasets

        where, names = f"data.id={self.id}, split {split}", split_names(split)
        if self.format != "parquet":
            parts = {name: [Part(file, None, file.size) for file in self.splits[name]] for name in names}
            return select_split({name: self.read(parts[name], where) for name in names}, split)
        lengths = {name: sum(chain.from_iterable(file.groups or () for file in self.splits[name])) for name in names}
        chosen: list[Dataset] = []
        for name, start, stop in spans_of(split, lengths):
            span, first = parts_with(self.splits[name], start, stop)
            if span:
                chosen.append(self.read(span, where).select(range(start - first, stop - first)))
        if not chosen:
            raise RequestError(f"{where} has no rows.")
        return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)

    def read(self, parts: Sequence[Part], where: str) -> "Dataset":
        """All rows of some parts."""
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from datasets.table import embed_table_storage

        files = self.fetch(parts, where) if self.commit else [Path(self.id, part.file.path) for part in parts]
        try:
            name = None if self.commit else files_digest(map(str, files), Path())
            rows = load_dataset(self.format, name, data_files=list(map(str, files)), split="train")
            if self.format == "imagefolder":  # a row of the Hub must not name one of the user's files
                rows = rows.with_format("arrow").map(embed_table_storage, batched=True, batch_size=32).with_format(None)
            return rows
        except (OSError, ValueError, DatasetsError) as error:
            raise RequestError(f"{where}: its files cannot be read: {first_cause(error)}.") from error

    def fetch(self, parts: Sequence[Part], where: str) -> list[Path]:
        """Parts of a repository of the Hub, as files on this disk."""
        from huggingface_hub import snapshot_download

        missing = [part for part in parts if not self.local(part).exists()]
        if missing:
            all_files = chain.from_iterable(self.splits.values())
            needed, total = (format_bytes(sum(entry.size for entry in entries)) for entries in (missing, all_files))
            if is_offline():
                raise RequestError(f"{where}: {needed} of it are not on this disk, and the Hub cannot be reached.")
            log.info(f"data: fetching {needed} of {total} for {where}")
        with hub_errors("data.id", self.id, "dataset"):
            whole = [glob.escape(part.file.path) for part in missing if part.groups is None]
            if whole:
                snapshot_download(self.id, repo_type="dataset", revision=self.commit, allow_patterns=whole)
            for part in missing:
                if part.groups is not None:
                    self.fetch_groups(part)
        return list(map(self.local, parts))

    def local(self, part: Part) -> Path:
        """Where a part is, once it has been fetched."""
        from huggingface_hub import constants, file_download

        if part.groups is None:
            name = file_download.repo_folder_name(repo_id=self.id, repo_type="dataset")
            return Path(constants.HF_HUB_CACHE, name, "snapshots", str(self.commit), part.file.path)
        return cache_folder() / f"{hash_of('groups', self.id, self.commit, part.file.path, part.groups)}.parquet"

    def fetch_groups(self, part: Part) -> None:
        """Row groups of a Parquet file, by ranges of its bytes, as a file of their own."""
        from huggingface_hub import HfFileSystem
        from pyarrow import parquet

        target = self.local(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        with HfFileSystem().open(f"datasets/{self.id}@{self.commit}/{part.file.path}") as file:
            source = parquet.ParquetFile(file, pre_buffer=True)
            with atomic_file(target) as unfinished, parquet.ParquetWriter(unfinished, source.schema_arrow) as writer:
                for group in part.groups or ():
                    writer.write_table(source.read_row_group(group))


def cache_folder() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "smolvlm_exp"


def parts_with(files: list[DataFile], start: int, stop: int) -> tuple[list[Part], int]:
    """The parts of Parquet files that hold the rows `start` to `stop`, and the number of their first row."""
    parts, first, at = [], None, 0
    for file in files:
        counts, begin = file.groups or [], at
        groups = []
        for group, rows in enumerate(counts):
            if at < stop and at + rows > start:
                groups.append(group)
            at += rows
        if not groups:
            continue
        size = round(file.size * sum(counts[group] for group in groups) / sum(counts))
        if size > MOSTLY * file.size:
            parts.append(Part(file, None, file.size))
            own = begin
        else:
            parts.append(Part(file, tuple(groups), size))
            own = begin + sum(counts[: groups[0]])
        first = own if first is None else first
    return parts, first or 0


def find_repository(id: str, revision: str | None, config_name: str | None, files: list[str] | None) -> Repository:
    """
    Args:
        id: a folder, or a name on the Hub.
        config_name: one of the configurations that its card names.
        files: patterns of those that hold the rows; None: as its card or their names tell.

    Raises:
        RequestError: there is no such repository, it cannot be reached, or it has no such files.
    """
    folder = Path(id).expanduser()
    if folder.is_dir():
        refuse_links_out(folder)
        return build(str(folder), None, None, config_name, files)
    if not is_hub_id(id):
        raise RequestError(f"data.id={id}: there is no such folder, and a dataset of the Hub is named OWNER/NAME.")
    kept = cache_folder() / f"{hash_of('repository', VERSION, id, revision, config_name, files)}.json"
    known = read_json(kept)
    if is_offline():
        if not known:
            raise RequestError(
                f"data.id={id}: it is not on this disk, and the Hub cannot be reached. Connect, or give the folder of "
                "a copy of it."
            )
        log.warning(f"data: {id} as it was found on {known['found']}, commit {known['commit'][:8]}")
    else:
        commit, license = commit_of(id, revision)
        if known.get("commit") != commit:
            made = build(id, commit, license, config_name, files)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, asdict(made))
            return made
    splits = {name: [DataFile(**file) for file in listed] for name, listed in known["splits"].items()}
    return Repository(**{**known, "splits": splits})


@cache
def commit_of(id: str, revision: str | None) -> tuple[str, Any]:
    """And the license that its card states. Asked once per process, so that all rows of a run are of one commit."""
    from huggingface_hub import HfApi

    with hub_errors("data.id", id, "dataset", revision):
        info = HfApi().dataset_info(id, revision=revision)
    return str(info.sha), info.card_data and info.card_data.get("license")


def build(id: str, commit: str | None, license: Any, config_name: str | None, files: list[str] | None) -> Repository:
    """`find_repository`, from the repository itself."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    with hub_errors("data.id", id, "dataset", commit):
        try:
            builder: Any = load_dataset_builder(id, config_name, revision=commit, data_files=files)
            root = f"hf://datasets/{id}@{commit}" if commit else Path(id).resolve().as_posix()
            with ThreadPoolExecutor(THREADS) as pool:
                splits = {
                    str(split): list(pool.map(lambda url: data_file(url, root, builder.name == "parquet"), urls))
                    for split, urls in builder.config.data_files.items()
                }
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it needs a loading script
            hint = " The Hub's own conversion of it: data.revision=refs/convert/parquet" if commit else ""
            raise RequestError(f"data.id={id}: {first_cause(error).rstrip('.')}.{hint}") from error
    license = ", ".join(license) if isinstance(license, list) else license
    return Repository(id, commit, license, builder.name, splits, date.today().isoformat())


def data_file(url: str, root: str, is_parquet: bool) -> DataFile:
    """
    Raises:
        ValueError: it lies outside the repository, whose card can name any file.
    """
    from fsspec.core import url_to_fs
    from pyarrow import parquet

    inside = url if "://" in url else Path(url).resolve().as_posix()
    if not inside.startswith(f"{root}/"):
        raise ValueError(f"{url} lies outside of the repository")
    system, path = url_to_fs(url)
    groups = None
    if is_parquet:
        with system.open(path) as file:
            footer = parquet.read_metadata(file)
        groups = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
    return DataFile(inside.removeprefix(f"{root}/"), system.size(path), groups)
