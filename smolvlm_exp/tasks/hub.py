"""Uploads to the Hugging Face Hub: account and card are checked before the work, the folder is uploaded after it."""

import logging
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from smolvlm_exp.utils.errors import RequestError, RunError, first_line
from smolvlm_exp.utils.hub import Kind, hub_problem
from smolvlm_exp.utils.paths import relative_to_cwd

log = logging.getLogger(__name__)

# training_args.bin and checkpoints hold the Hub token in clear.
NOT_UPLOADED = ["training_args.bin", "**/training_args.bin", "checkpoints/**", "wandb/**", ".hydra/**", "**/.*"]


def check_account(setting: str, repository: str, card_data: str | None = None) -> str:
    """The repository's full name, OWNER/NAME, once it is sure that it can be written.

    Args:
        setting: the one that names the repository.
        card_data: YAML of its model card, which the Hub validates.

    Raises:
        RequestError: the Hub cannot be reached, nobody is logged in, the account may not write there, or the Hub would
            refuse the card.
    """
    try:
        account = HfApi().whoami()
    except Exception as error:  # whichever of the client's many: no network, no token, a revoked one
        raise RequestError(
            f"{setting}={repository}: {first_line(error)}\nLog in with `hf auth login`, or leave out {setting}."
        ) from error
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise RequestError(f"{setting}={repository}: your token may only read. Log in with one that may write.")
    owner, _, name = repository.rpartition("/")
    owner = owner or account["name"]
    namespaces = [account["name"], *(org["name"] for org in account.get("orgs", ()))]
    if owner not in namespaces:
        raise RequestError(
            f"{setting}={repository}: your account may not write to {owner}, but to {', '.join(namespaces)}."
        )
    if card_data:
        try:
            ModelCard(f"---\n{card_data}\n---\n").validate()
        except ValueError as error:
            raise RequestError(f"{setting}={repository}: the Hub would refuse the card: {error}") from error
    return f"{owner}/{name}"


def upload(folder: Path, repository: str, private: bool, kind: Kind = "model", files: list[str] | None = None) -> None:
    """
    Args:
        repository: OWNER/NAME.
        files: patterns of what is uploaded; None: everything but `NOT_UPLOADED`.

    Raises:
        RunError: it failed; the files are whole, and the message says how to upload them later.
    """
    try:
        address = HfApi().create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            allow_patterns=files,
            ignore_patterns=NOT_UPLOADED,
            commit_message="Upload by smolvlm_exp",
        )
    except Exception as error:
        problem = hub_problem(error, repository, kind) or first_line(error)
        patterns = "".join(f" --include '{pattern}'" for pattern in files or ())
        raise RunError(
            f"Everything is written, but not uploaded to {repository}: {problem}\nUpload it later: hf upload "
            f"{repository} {relative_to_cwd(folder)} . --repo-type {kind}{' --private' if private else ''}{patterns}"
        ) from error
    log.info(f"uploaded: {address}")
