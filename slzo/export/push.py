"""Upload an exported folder to the Hugging Face Hub."""

import shlex
from pathlib import Path

from slzo.utils.errors import SlzoError, one_line
from slzo.utils.hub import HUB_ID, hub_bars


def check_repository(repository: str | None, private: bool) -> None:
    """Check the options of an upload before long work.

    Raises:
        SlzoError: The repository is not a Hub id, or only ``private`` is given.
    """
    if repository is None:
        if private:
            raise SlzoError(
                "private true: is used only with push_to_hub; give --push_to_hub ME/NAME too, or leave it out"
            )
        return
    if "/" not in repository or not HUB_ID.fullmatch(repository):
        raise SlzoError(f"push_to_hub {repository!r}: must be a Hub id like 'me/my-model'")


def push(folder: Path, repository: str, private: bool) -> str:
    """Create a repository if needed and upload a folder as one commit, with the token of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The address of the repository.

    Raises:
        SlzoError: The Hub cannot be reached or rejects the upload, or the repository must be private and is not; the folder is
            kept.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repository, exist_ok=True, private=private or None))
        is_public = private and not api.model_info(repository).private  # one that existed stays as it was
        if not is_public:
            with hub_bars():
                message = "Tuned with slzo"
                api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:  # of the Hub, of files, or of the HTTP library, which differs between versions
        reason = one_line(error)
        command = f"hf upload {repository} {shlex.quote(str(folder))}{' --private' if private else ''}"
        raise SlzoError(
            f"push_to_hub {repository!r}: not uploaded ({reason}); check the name, the connection and `hf auth login`; the "
            f"folder is complete, so `{command}` is enough"
        ) from error
    if is_public:
        raise SlzoError(
            f"push_to_hub {repository!r}: not uploaded, because it exists and is public; make it private in its settings on "
            f"{address}, or choose another name"
        )
    return address
