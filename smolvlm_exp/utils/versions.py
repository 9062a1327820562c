"""Package versions, the commit of this package's code, and torchvision's fit with torch."""

import contextlib
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from smolvlm_exp import HOME
from smolvlm_exp.utils.errors import RequestError

PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets",
    "accelerate", "hydra-core", "omegaconf", "wandb", "pillow",
)  # fmt: skip


@cache
def versions() -> Mapping[str, str]:
    """Of Python and of those PACKAGES that are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # wandb is not needed with tracker=none
            installed[package] = version(package)
    return installed


def code_commit() -> tuple[str | None, bool]:
    """Of the checkout that this package runs from, and whether its files differ from it; None where there is none."""
    if not Path(HOME, ".git").exists():
        return None, False
    command = ["git", "-C", HOME, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or the checkout is another user's
        return None, False
    return commit.removesuffix("-dirty"), commit.endswith("-dirty")


def check_torchvision() -> None:
    """transformers imports torchvision where it is installed, and reports its failure as one of its own modules.

    Raises:
        RequestError: it was built for another torch, e.g. for CUDA where torch is for the CPU.
    """
    if find_spec("torchvision") is None:
        return
    import torch

    try:
        import_module("torchvision")
    except Exception as error:  # RuntimeError of an operator that this torch lacks, OSError of a CUDA library
        raise RequestError(
            f"torchvision {version('torchvision')} is incompatible with torch {torch.__version__} ({str(error)[:80]}): "
            "pip uninstall torchvision; Pillow is enough."
        ) from error
