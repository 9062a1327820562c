"""Upload of an exported folder to the Hugging Face Hub."""

from pathlib import Path

from smolvlm_exp.utils.errors import RequestError

# training_args.bin and checkpoints hold the Hub token in clear.
IGNORED = ["training_args.bin", "**/training_args.bin", "checkpoints/**", "wandb/**", ".hydra/**", "**/.*"]


def check_account(repository: str) -> None:
    """
    Raises:
        RequestError: the Hub cannot be reached, or nobody is logged in: now and not after the work.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # whichever of the client's many: no network, no token, a revoked one
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"export.push_to_hub={repository}: {first}\nLog in with `hf auth login`, or leave out export.push_to_hub."
        ) from error


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload `folder`; returns the address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    address = hub.create_repo(repository, private=private, exist_ok=True)
    hub.upload_folder(
        repo_id=repository, folder_path=folder, ignore_patterns=IGNORED, commit_message="Upload by smolvlm_exp"
    )
    return str(address)
