"""Sizes in bytes as people write them in settings: 8GiB, 500MB."""

import re

from smolvlm_exp.utils.errors import RequestError

UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30, "TB": 10**12, "TiB": 2**40}


def size_of(text: str) -> int | None:
    """Bytes that a text such as `1.5 GiB` names; None where it names none."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text.strip())
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def bytes_of(key: str, text: str) -> int:
    """`8GiB` -> 8589934592.

    Args:
        key: the setting's full name.

    Raises:
        RequestError: it is no size.
    """
    found = size_of(text)
    if found is None:
        raise RequestError(f"{key}={text} is no size; write it as 8GiB or 500MB.")
    return found
