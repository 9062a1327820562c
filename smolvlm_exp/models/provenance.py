"""Where a checkpoint comes from."""

from pathlib import Path

from smolvlm_exp.models.model import ModelConfig, checkpoint_file
from smolvlm_exp.utils.hub import Provenance, hub_errors, is_offline


def provenance(config: ModelConfig) -> Provenance:
    """Of the checkpoint as it was loaded; a folder, or random weights, have neither commit nor licence."""
    if config.id == "embedded":
        return Provenance(config.id, None, "apache-2.0")
    file = checkpoint_file(config, "config.json")
    if config.weights == "random" or file is None or Path(config.id).expanduser().is_dir():
        return Provenance(config.id, None, None)
    return Provenance(config.id, file.parent.name, license_of(config.id, file.parent.name))


def license_of(id: str, commit: str) -> str | None:
    """As the model card says; None where it says nothing, or is not on this disk and the Hub cannot be reached."""
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with hub_errors("model.id", id, "model"):
            card = hf_hub_download(id, "README.md", revision=commit, local_files_only=is_offline())
        return ModelCard.load(card).data.get("license")
    except (EntryNotFoundError, ValueError):  # ValueError: no YAML at its head; RequestError is one too
        return None
