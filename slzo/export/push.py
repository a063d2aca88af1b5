"""Upload an exported folder to the Hugging Face Hub."""

from pathlib import Path

from slzo.utils.errors import SlzoError
from slzo.utils.hub import HUB_ID


def check_repository(repository: str) -> None:
    """Check the name of a repository before long work.

    Raises:
        SlzoError: It is not a Hub id.
    """
    if not HUB_ID.fullmatch(repository):
        raise SlzoError(f"push_to_hub {repository!r}: must be a Hub id like 'me/my-model'")


def push(folder: Path, repository: str) -> None:
    """Create a repository if needed and upload a folder as one commit, with the token of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        SlzoError: The Hub cannot be reached or rejects the upload; the folder is kept.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Tuned with slzo, forward passes only")
    except Exception as error:  # of the Hub, of files, or of the HTTP library, which differs between versions
        reason = " ".join(str(error).split())[:200]
        raise SlzoError(
            f"push_to_hub {repository!r}: not uploaded ({reason}); check the name, the connection and `hf auth login`; the "
            f"folder is complete, so `hf upload {repository} {folder}` is enough"
        ) from error
