"""Rows of a data set on the Hugging Face Hub, at a commit."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slzo.tasks.base import HubSource, Split
from slzo.tasks.fields import Fields
from slzo.utils.console import inform
from slzo.utils.errors import SlzoError, one_line
from slzo.utils.hub import causes, commit_of, known_problem


def read_hub(source: HubSource, split: Split, option: str) -> tuple[str, Iterable[Fields], str | None]:
    """Load a split of a data set.

    Args:
        source: The data set.
        split: Split of the task.
        option: Option and value that error messages begin with.

    Returns:
        The name of the split, for messages, its rows, and the commit that was loaded, ``None`` if it is unknown.

    Raises:
        SlzoError: The Hub does not have it, needs a login, or cannot be reached, and it is not in the cache.
    """
    name = source.train if split == "train" else source.test
    origin = f"{source.path}{f' ({source.config})' if source.config else ''} split {name!r}"
    if not sys.stderr.isatty():  # on a terminal, datasets shows bars
        inform(f"Loading {origin} from the Hub")
    given = source.path if source.revision is None else f"{source.path}@{source.revision}"
    try:
        import datasets

        wanted = None if source.revision is None else _resolve(source)
        at = {} if wanted is None else {"revision": wanted}
        rows = datasets.load_dataset(source.path, source.config, split=name, **at)
    except Exception as error:  # datasets and its dependencies raise many unrelated classes
        if (problem := known_problem(error, source.path, "dataset")) is not None:
            raise SlzoError(f"{option}: {problem}; or give a local folder as data.data_dir") from error
        first = causes(error)[-1]
        reason = one_line(first).rstrip(" .")
        raise SlzoError(
            f"{option}: cannot load {origin} from the Hub ({type(first).__name__}: {reason});"
            " check the connection, data.hub_path, data.hub_config and access rights, or give a local folder as data.data_dir"
        ) from None
    commit = _commit_of(rows)
    if wanted is not None and commit not in (None, wanted):  # offline, datasets takes what is in its cache
        raise SlzoError(
            f"data.hub_path {given!r}: only commit {commit} is in the cache, and the Hub cannot be "
            "reached; connect to the network once, or give that commit"
        )
    return origin, rows, commit


def _resolve(source: HubSource) -> str:
    """Return the commit of a revision."""
    from huggingface_hub import HfApi

    assert source.revision is not None
    if commit_of(Path(source.revision)) is not None:
        return source.revision
    return str(HfApi().dataset_info(source.path, revision=source.revision).sha)


def _commit_of(rows: Any) -> str | None:
    """Return the commit in the path of a data set's cached files."""
    files = getattr(rows, "cache_files", None)
    return commit_of(Path(files[0]["filename"]).parent) if files else None
