"""rows.safetensors in a run's folder: its training and held-out rows, and each held-out row's part in each metric.

task=compare pairs runs by it row by row, and task=evaluate finds the rows that a model was trained on.
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
    train: np.ndarray  # (rows,) uint64, of each row's question and images
    test: np.ndarray
    ratios: dict[str, Ratio]  # of the tuned model


def save_per_row(folder: Path, fingerprints: Mapping[str, Sequence[bytes]], ratios: Mapping[str, Ratio]) -> None:
    """
    Args:
        fingerprints: Preferences.prints.
        ratios: of the tuned model on the held-out rows.
    """
    arrays = {split: short_fingerprints(rows) for split, rows in fingerprints.items()}
    for name, ratio in ratios.items():
        arrays[f"metric {name}"] = np.stack([ratio.top, ratio.bottom, np.full(len(ratio.top), ratio.empty)])
    save_file(arrays, folder / FILE)


def load_per_row(folder: Path) -> PerRowResults | None:
    """None where the file is missing or damaged."""
    try:
        arrays = load_file(folder / FILE)
        stored = {name.partition(" ")[2]: array for name, array in arrays.items() if name.startswith("metric ")}
        ratios = {name: Ratio(top, bottom, float(empty[0])) for name, (top, bottom, empty) in stored.items()}
        return PerRowResults(arrays["train"], arrays["test"], ratios)
    except (OSError, ValueError, KeyError, IndexError, SafetensorError):
        return None


def short_fingerprints(fingerprints: Sequence[bytes]) -> np.ndarray:
    """Eight bytes of each: two of a million rows are alike by chance once in 40 million times."""
    return np.frombuffer(b"".join(row[:8] for row in fingerprints), dtype=np.uint64)
