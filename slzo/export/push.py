"""Puts an exported folder on the Hugging Face Hub."""

from pathlib import Path

from slzo.models.load import HUB_ID
from slzo.utils.errors import SlzoError


def check_repository(repository: str) -> None:
    """Refuse what cannot be a repository, before long work.

    Raises:
        SlzoError: It is no Hub id.
    """
    if not HUB_ID.fullmatch(repository):
        raise SlzoError(f"push_to_hub {repository!r}: must be a Hub id like 'me/my-model'")


def push(folder: Path, repository: str) -> str:
    """Make a repository if there is none, and upload a folder as one commit, with the token of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        Address of the commit.

    Raises:
        SlzoError: The Hub cannot be reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Tuned with slzo, forward passes only"
        )
    except Exception as error:  # its own, those of files, and those of an HTTP library that differs between versions
        reason = " ".join(str(error).split())[:200]
        raise SlzoError(
            f"push_to_hub {repository!r}: not uploaded ({reason}); check the name, the connection and `hf auth login`; the "
            f"folder is whole, so `hf upload {repository} {folder}` is enough"
        ) from error
    return str(commit.commit_url)
