"""An exported folder: its record (export.json), and the check that no other files are in it."""

from pathlib import Path
from typing import Any

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import read_json, write_json

RECORD = "export.json"  # where an export comes from, how good it is, and its files


def read_record(folder: Path) -> dict[str, Any]:
    """Empty where there is no export."""
    return read_json(folder / RECORD)


def write_record(folder: Path, content: dict[str, Any]) -> None:
    """The last file of an export: it lists the others."""
    write_json(folder / RECORD, {"written_by": "smolvlm_exp", **content, "files": file_sizes(folder)})


def check_free(folder: Path) -> None:
    """RequestError where `folder` has files that no export wrote: `atomic_folder` would delete them."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file: set another export.folder.")
    exported = {RECORD, *read_record(folder).get("files", {})}
    other = next((name for name in file_sizes(folder) if name not in exported), None)
    if other:
        raise RequestError(f"{folder} also has other files ({other}): set another export.folder, or move them away.")


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below, by its path from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
