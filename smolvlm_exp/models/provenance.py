"""Where a checkpoint comes from."""

from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from smolvlm_exp.models.model import ModelConfig
from smolvlm_exp.utils.hub import Provenance, hub_errors, is_offline


def provenance(config: ModelConfig) -> Provenance:
    """Of the checkpoint as it was loaded; a folder, or random weights, have neither commit nor licence."""
    if config.id == "embedded":
        return Provenance(config.id, None, "apache-2.0")
    if config.weights == "random" or Path(config.id).expanduser().is_dir():
        return Provenance(config.id)
    with hub_errors("model.id", config.id, "model", config.revision):
        file = hf_hub_download(config.id, "config.json", revision=config.revision, local_files_only=is_offline())
    commit = Path(file).parent.name
    return Provenance(config.id, commit, license_of(config.id, commit))


def license_of(id: str, commit: str) -> str | None:
    """As the model card says; None where it says nothing, or is not on this disk and the Hub cannot be reached."""
    try:
        card = hf_hub_download(id, "README.md", revision=commit, local_files_only=is_offline())
        stated = ModelCard.load(card).data.get("license")
    except (EntryNotFoundError, ValueError):  # ValueError: there is no YAML at its head
        return None
    return str(stated) if stated else None
