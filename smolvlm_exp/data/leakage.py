"""Held-out rows that are trained on prove nothing."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def leaked_rows(train: Sequence[bytes], test: Sequence[bytes]) -> list[int]:
    """The held-out rows whose pictures and question are those of a training row, whatever its answers.

    Args:
        train, test: fingerprints of their rows.
    """
    seen = set(train)
    return [i for i, fingerprint in enumerate(test) if fingerprint in seen]


def fingerprints(rows: "Dataset") -> list[bytes]:
    """A hash of each row's question and of its pictures' files; nothing is decoded."""
    from smolvlm_exp.data.messages import text_of

    stored: Any = rows.select_columns(["images", "prompt"]).with_format("arrow")
    found = []
    for batch in stored.iter(256):
        for images, prompt in zip(batch["images"].to_pylist(), batch["prompt"].to_pylist(), strict=True):
            digest = hashlib.sha256(text_of(prompt).encode())
            for entry in images or []:
                digest.update(hashlib.sha256(entry["bytes"]).digest())
            found.append(digest.digest())
    return found
