"""Package versions, and torchvision's fit with torch."""

import contextlib
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from smolvlm_exp.utils.errors import RequestError

PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets",
    "accelerate", "hydra-core", "omegaconf", "wandb", "pillow",
)  # fmt: skip


def versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # wandb is not needed with tracker=none
            installed[package] = version(package)
    return installed


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
