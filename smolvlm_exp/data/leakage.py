"""Held-out rows that are trained on prove nothing."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from smolvlm_exp.data.messages import text_of

if TYPE_CHECKING:
    from datasets import Dataset


def leaked_rows(train: Sequence[bytes], test: Sequence[bytes]) -> list[int]:
    """The held-out rows whose images and question are those of a training row, whatever its answers.

    Args:
        train, test: fingerprints of their rows.
    """
    seen = set(train)
    return [i for i, fingerprint in enumerate(test) if fingerprint in seen]


def fingerprints(rows: "Dataset") -> list[bytes]:
    """A hash of each row's question and of its images' files."""
    columns = rows.select_columns(["image_sha256", "prompt"])[:]
    return [
        hashlib.sha256(b"".join([text_of(prompt).encode(), *images])).digest()
        for images, prompt in zip(columns["image_sha256"], columns["prompt"], strict=True)
    ]
