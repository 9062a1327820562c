"""Sizes in bytes as people write and read them: 8GiB, 500MB."""

import re

from smolvlm_exp.utils.errors import RequestError

GIB = 2**30
UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": GIB, "TB": 10**12, "TiB": 2**40}


def size_of(text: str) -> int | None:
    """Bytes of a text such as `1.5 GiB`; None where it is not a size."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text.strip())
    return int(float(match[1]) * UNITS[match[2]]) if match else None


def format_bytes(size: float) -> str:
    """`46.8 MiB`, `1.5 GiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def bytes_of(key: str, text: str) -> int:
    """`8GiB` -> 8589934592; a `RequestError` names the setting, by its full name, whose text is not a size."""
    size = size_of(text)
    if size is None:
        raise RequestError(f"{key}={text} is not a size; write it as 8GiB or 500MB.")
    return size
