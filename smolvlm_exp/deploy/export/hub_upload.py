"""To the Hugging Face Hub: an exported folder, and nothing else."""

from pathlib import Path

from smolvlm_exp.utils.errors import RequestError

# training_args.bin holds the token in clear, and checkpoints hold it.
NEVER = ["training_args.bin", "**/training_args.bin", "checkpoints/**", "wandb/**", ".hydra/**", "**/.*"]


def check_account(repository: str) -> None:
    """
    Raises:
        RequestError: the hub cannot be reached, or nobody is logged in: told before the work, not after.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # whichever of the client's many: no network, no token, a revoked one
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"export.push_to_hub={repository}: {first}\nLog in with `hf auth login`, or export without it."
        ) from error


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload `folder`; returns the address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    address = hub.create_repo(repository, private=private, exist_ok=True)
    hub.upload_folder(
        repo_id=repository, folder_path=folder, ignore_patterns=NEVER, commit_message="Upload of smolvlm_exp"
    )
    return str(address)
