"""Hydra-composed experiments that fine-tune SmolVLM with QLoRA, DoRA and DPO on the GPU you own."""

import os
import sys

HOME = os.path.dirname(os.path.dirname(__file__))
# Under `python -m` the working folder comes first on the path, and any yaml.py in a folder of data would be imported.
# Not where it is this repository's own; with PYTHONSAFEPATH workers, launchers and compilers leave it out too.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    try:
        here = os.getcwd()
    except FileNotFoundError:
        sys.exit("smolvlm_exp: the folder that you are in was removed; go to another.")
    if sys.path[0] == here != HOME:
        del sys.path[0]
        os.environ["PYTHONSAFEPATH"] = "1"

import time  # noqa: E402
from typing import Any  # noqa: E402

IMPORTED = time.perf_counter()  # a command has just begun

__version__ = "0.1.0"

# Where `kernels` is installed, importing bitsandbytes on some CPUs fetches code from the Hub and runs it, and
# transformers may. With None here it counts as not installed.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

# TRL tells the Hub of every run: trainer, architecture, the GPU's name and memory. Not here, unless this is set to 0.
if os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1") != "0" and "huggingface_hub.constants" in sys.modules:
    vars(sys.modules["huggingface_hub.constants"])["HF_HUB_DISABLE_TELEMETRY"] = True  # it was imported before

# GNU OpenMP's threads spin while they wait for each other, by default for milliseconds. Where another program has one
# of two cores, every operation waits like this for the thread that is not running: an evaluation took 210 s, not 15.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

HOMES = dict.fromkeys(("train", "evaluate", "compare", "compose"), "tasks.notebook") | {
    "SmolVLMSession": "deploy.session.session"
}


def __getattr__(name: str) -> Any:
    """`from smolvlm_exp import train`: imported on first use, so that a command stays fast."""
    if name not in HOMES:
        raise AttributeError(f"module 'smolvlm_exp' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"smolvlm_exp.{HOMES[name]}"), name)
