"""Which versions a run had."""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version

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
