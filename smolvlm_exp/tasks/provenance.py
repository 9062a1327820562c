"""Where a run's model and rows come from, for whoever wants to have the same, or may not use them."""

import logging
from typing import Any

import torch

from smolvlm_exp import __version__
from smolvlm_exp.config.schema import Config
from smolvlm_exp.data import preferences
from smolvlm_exp.models import provenance as models
from smolvlm_exp.models.model import resolve_dtype
from smolvlm_exp.utils.cores import usable_cores
from smolvlm_exp.utils.hub import Provenance
from smolvlm_exp.utils.versions import code_commit

log = logging.getLogger(__name__)


def provenance(config: Config) -> dict[str, Provenance]:
    """Of the model and the data, once both have been loaded; logged."""
    sources = {"model": models.provenance(config.model), "data": preferences.provenance(config.data)}
    log.info("sources: " + ", ".join(f"{name} {source}" for name, source in sources.items()))
    return sources


def code_provenance() -> Provenance:
    """Of this package."""
    commit, changed = code_commit()
    return Provenance(f"smolvlm_exp {__version__}{' with changes' if changed else ''}", commit, "apache-2.0")


def hardware(config: Config, model: Any) -> dict[str, str]:
    """What the numbers were computed on, and in."""
    gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if gpu else f"CPU, {usable_cores()} cores"
    return {"device": device, "dtype": str(resolve_dtype(config.model.dtype)).removeprefix("torch.")}
