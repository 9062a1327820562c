"""Uploads to the Hugging Face Hub: the account is checked before the work, the folder uploaded after it."""

import logging
from pathlib import Path

from huggingface_hub import HfApi

from smolvlm_exp.utils.errors import RequestError, first_line

log = logging.getLogger(__name__)

# training_args.bin and checkpoints hold the Hub token in clear.
NOT_UPLOADED = ["training_args.bin", "**/training_args.bin", "checkpoints/**", "wandb/**", ".hydra/**", "**/.*"]


def check_account(setting: str, repository: str) -> None:
    """RequestError, which names the `setting`, where the Hub cannot be reached or nobody is logged in."""
    try:
        HfApi().whoami()
    except Exception as error:  # whichever of the client's many: no network, no token, a revoked one
        raise RequestError(
            f"{setting}={repository}: {first_line(error)}\nLog in with `hf auth login`, or leave out {setting}."
        ) from error


def upload(folder: Path, repository: str, private: bool, kind: str = "model", files: list[str] | None = None) -> None:
    """
    Args:
        kind: of repository: model or dataset.
        files: patterns of what is uploaded; None: everything but `NOT_UPLOADED`.
    """
    address = HfApi().create_repo(repository, repo_type=kind, private=private, exist_ok=True)
    HfApi().upload_folder(
        repo_id=repository,
        repo_type=kind,
        folder_path=folder,
        allow_patterns=files,
        ignore_patterns=NOT_UPLOADED,
        commit_message="Upload by smolvlm_exp",
    )
    log.info(f"uploaded: {address}")
