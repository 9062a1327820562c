"""Which versions a run had, and two that do not go together."""

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
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # wandb is not needed with tracker=none
            found[package] = version(package)
    return found


def check_torchvision() -> None:
    """transformers imports torchvision where it finds it, and tells of its failure as that of some module of its own.

    Raises:
        RequestError: it was built for another torch, as the registry's (for CUDA) was beside one for the CPU.
    """
    if find_spec("torchvision") is None:
        return
    import torch

    try:
        import_module("torchvision")
    except Exception as error:  # RuntimeError of an operator that this torch lacks, OSError of a CUDA library
        raise RequestError(
            f"torchvision {version('torchvision')} does not go with torch {torch.__version__} ({str(error)[:80]}): "
            "pip uninstall torchvision; Pillow serves."
        ) from error
