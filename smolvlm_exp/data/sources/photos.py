"""Hand-written pairs over ten freely licensed photos that ship with the package (`photos/CREDITS.md`).

Chosen answers say what is there; rejected ones add or change a thing that a model is tempted to see. Two of the photos
are held out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolvlm_exp.data.config import DataConfig
from smolvlm_exp.data.sources import files

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = Path(__file__).parent / "photos"
LICENSE = "apache-2.0"  # of the pairs; the photos' own: photos/CREDITS.md


@dataclass
class Config(DataConfig):
    """The photos have no settings of their own."""


def load(config: Config, split: str) -> "Dataset":
    """The rows of a split, read as data=files reads any such folder."""
    return files.load(files.Config(folder=str(FOLDER)), split)
