"""rows.safetensors in a run's folder: which rows it was tuned and looked at with, and what each adds to each metric.

By it task=compare pairs runs row by row, and task=evaluate knows the rows that a model was tuned on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from smolvlm_exp.evaluation.statistics import Ratio

FILE = "rows.safetensors"


@dataclass(frozen=True)
class PerRowResults:
    train: np.ndarray  # (rows,) uint64, of each row's question and pictures
    test: np.ndarray
    ratios: dict[str, Ratio]  # of the tuned model


def save_per_row(folder: Path, prints: Mapping[str, Sequence[bytes]], ratios: Mapping[str, Ratio]) -> None:
    """
    Args:
        prints: Preferences.prints.
        ratios: of the tuned model on the held-out rows.
    """
    arrays = {split: short_fingerprints(found) for split, found in prints.items()}
    for name, each in ratios.items():
        arrays[f"metric {name}"] = np.stack([each.top, each.bottom, np.full(len(each.top), each.empty)])
    save_file(arrays, folder / FILE)


def load_per_row(folder: Path) -> PerRowResults | None:
    """None where there are none, or not whole."""
    try:
        arrays = load_file(folder / FILE)
        stored = {name.partition(" ")[2]: each for name, each in arrays.items() if name.startswith("metric ")}
        ratios = {name: Ratio(top, bottom, float(empty[0])) for name, (top, bottom, empty) in stored.items()}
        return PerRowResults(arrays["train"], arrays["test"], ratios)
    except (OSError, ValueError, KeyError, IndexError, SafetensorError):
        return None


def short_fingerprints(prints: Sequence[bytes]) -> np.ndarray:
    """Eight bytes of each: two of a million rows are alike by chance once in 40 million times."""
    return np.frombuffer(b"".join(each[:8] for each in prints), dtype=np.uint64)
