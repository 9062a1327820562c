"""The folder of an export, which `checkpoint.whole` writes: nobody else's files are touched."""

from pathlib import Path
from typing import Any

from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.files import read_json, write_json

RECORD = "export.json"  # in every export: what it was made of, how good it is, and its files


def read_record(folder: Path) -> dict[str, Any]:
    """What an export of ours says of itself; empty where there is none."""
    return read_json(folder / RECORD)


def check_free(folder: Path) -> None:
    """
    Raises:
        RequestError: there is something in `folder` that an export of ours did not put there.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file: give another export.folder.")
    own = {RECORD, *read_record(folder).get("files", {})}
    other = next((name for name in files_in(folder) if name not in own), None)
    if other:
        raise RequestError(f"{folder} has something else in it ({other}): give another export.folder, or move it away.")


def files_in(folder: Path) -> dict[str, int]:
    """Bytes of each file below, by its path from there."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def record(folder: Path, content: dict[str, Any]) -> None:
    """Write RECORD, with the files that `folder` has; it is the last of them."""
    whole = {"written_by": "smolvlm_exp", **content, "files": files_in(folder)}
    write_json(folder / RECORD, whole)
