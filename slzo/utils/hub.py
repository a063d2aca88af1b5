"""Names, commits and downloads of repositories on the Hugging Face Hub; a commit is a folder in the cache of huggingface_hub."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from slzo.utils.console import is_first_process, rank_zero_info
from slzo.utils.errors import SlzoError, one_line

HUB = "https://huggingface.co/"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

RepoType = Literal["model", "dataset"]

# configs, tokenizers, code and licences; weights are fetched later, and files in subfolders are other models
_SMALL = (
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "*TERMS*"),
)
_OTHER = ("*/*.json", "*/*.txt", "*/*.model", "*/*.md")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as transformers looks for them
_COMMIT = re.compile(r"[0-9a-f]{40}")


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``org/name@revision``; the revision is ``None`` if there is none."""
    id, at, revision = name.partition("@")
    return id, revision if at else None


def commit_of(folder: Path) -> str | None:
    """Return the commit of a model's or data set's folder in a cache; ``None`` for any other folder."""
    return folder.name if _COMMIT.fullmatch(folder.name) else None


def repository_of(folder: Path) -> str | None:
    """Return the Hub id of a model's folder in the cache of the Hub; ``None`` for any other folder."""
    snapshots, repository = folder.parent.name, folder.parent.parent.name
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    id = repository.removeprefix("models--").replace("--", "/")
    return id if HUB_ID.fullmatch(id) else None


def model_commit(name: str, folder: str | Path | None) -> str | None:
    """Return the commit of a model that was loaded from a folder; ``None`` unless it is from the Hub."""
    path = Path(folder or "")
    return commit_of(path) if repository_of(path) == split_revision(name)[0] else None


@cache
def model_folder(id: str, revision: str | None) -> Path:
    """Return the cached folder of a model at a commit, and fetch all of its files but the weights.

    The revision is a branch, a tag or a commit, ``None`` for the main branch. Within a process, a name stays at one commit.

    Raises:
        SlzoError: The Hub does not have it, needs a login, or cannot be reached, and it is not in the cache.
    """
    with _as_slzo_error(id, revision), hub_bars(False):
        return _fetch(id, revision, _SMALL)


def fetch_weights(folder: Path) -> None:
    """Fetch the weights of a model into its folder from :func:`model_folder`; other folders are left as they are.

    The first process prints the size, and on a terminal it shows the bars of huggingface_hub.

    Raises:
        SlzoError: The Hub cannot be reached, or the download breaks off.
    """
    id, commit = repository_of(folder), commit_of(folder)
    if id is None or commit is None:
        return
    with _as_slzo_error(id, None), hub_bars():
        missing = [[file for file in files if not (folder / file).is_file()] for files in _weight_files(folder)]
        if not all(missing):
            return
        for files in missing:
            if size := _size(id, commit, files):
                rank_zero_info(f"Downloading {id}: {_format_size(size)}")
                _fetch(id, commit, files, folder.parents[2])
                return


def _weight_files(folder: Path) -> list[list[str]]:
    """Return the names of the files that may hold the weights, the files of the best format first."""
    found: list[list[str]] = []
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [*found, sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
        found.append([name])
    return found


def _format_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@contextmanager
def hub_bars(wanted: bool = True) -> Iterator[None]:
    """Show the progress bars of huggingface_hub within a block on a terminal, in the first process only; otherwise hide them."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:  # decided by the user's environment
        yield
        return
    hidden, shown = utils.are_progress_bars_disabled(), wanted and is_first_process() and sys.stderr.isatty()
    (utils.enable_progress_bars if shown else utils.disable_progress_bars)()
    try:
        yield
    finally:
        (utils.disable_progress_bars if hidden else utils.enable_progress_bars)()


def _size(id: str, commit: str, files: Sequence[str]) -> int:
    """Return the size of those files that the repository has, in bytes."""
    from huggingface_hub import HfApi

    return sum(getattr(found, "size", 0) for found in HfApi().get_paths_info(id, list(files), revision=commit))


def _fetch(id: str, revision: str | None, patterns: Sequence[str], cache_dir: Path | None = None) -> Path:
    from huggingface_hub import snapshot_download

    wanted, others = list(patterns), list(_OTHER)
    try:
        return Path(
            snapshot_download(id, revision=revision, cache_dir=cache_dir, allow_patterns=wanted, ignore_patterns=others)
        )
    except OSError as error:
        if cache_dir is None and (cached := getattr(error, "snapshot_path", None)) is not None:
            return Path(cached)  # offline, and some file that may not be needed was never fetched
        raise


@contextmanager
def _as_slzo_error(id: str, revision: str | None) -> Iterator[None]:
    """Raise SlzoError with one line for errors with a model of the Hub."""
    try:
        yield
    except Exception as error:  # of the Hub, of files, or of the HTTP library, which differs between versions
        name, first = id if revision is None else f"{id}@{revision}", causes(error)[-1]
        reason = one_line(first).rstrip(" .") or type(first).__name__
        problem = known_problem(error, id) or (
            f"cannot be downloaded ({reason}); check the connection and the disk, and run again"
        )
        raise SlzoError(f"model.model {name!r}: {problem}; or use a local folder or a built-in name") from error


def known_problem(error: Exception, id: str, repo_type: RepoType = "model") -> str | None:
    """Return what is wrong with a repository of the Hub and what to do, in one line; ``None`` for other errors.

    ``error`` is what huggingface_hub, transformers or datasets raised.
    """
    from huggingface_hub import errors

    chain, text = causes(error), str(error)
    # datasets leaves out what its error came from
    unknown_data = type(error).__name__ == "DatasetNotFoundError"

    def has(sort: type[Exception]) -> bool:
        return any(isinstance(each, sort) for each in chain)

    page = f"{HUB}{'datasets/' if repo_type == 'dataset' else ''}{id}"
    if has(errors.RevisionNotFoundError) or (unknown_data and text.startswith("Revision")):
        return f"the Hub has no such revision; give a branch, a tag or a commit of {page}/commits/main"
    if has(errors.GatedRepoError) or (unknown_data and "gated" in text):
        return f"its licence must be accepted first; accept it on {page} and log in with `hf auth login`"
    if has(errors.RepositoryNotFoundError) or unknown_data:
        what = {"model": "model", "dataset": "data set"}[repo_type]
        return f"the Hub has no such {what}, or it is private; check the name, or log in with `hf auth login`"
    return None


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and its causes; the original error is last."""
    found: list[BaseException] = []
    earlier: BaseException | None = error
    while earlier is not None and earlier not in found:
        found.append(earlier)
        earlier = earlier.__cause__ or (None if earlier.__suppress_context__ else earlier.__context__)
    return found
