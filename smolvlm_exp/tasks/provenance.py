"""Where a run's model and rows come from, for whoever wants to have the same, or may not use them."""

import logging

from smolvlm_exp.config.schema import Config
from smolvlm_exp.data import preferences
from smolvlm_exp.models import provenance as models
from smolvlm_exp.utils.hub import Provenance

log = logging.getLogger(__name__)


def provenance(config: Config) -> dict[str, Provenance]:
    """Of the model and the data, once both have been loaded; logged."""
    sources = {"model": models.provenance(config.model), "data": preferences.provenance(config.data)}
    log.info("sources: " + ", ".join(f"{name} {source}" for name, source in sources.items()))
    return sources
