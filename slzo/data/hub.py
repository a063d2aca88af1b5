"""Rows of a data set on the Hugging Face Hub, at a commit."""

import sys
from collections.abc import Iterable
from pathlib import Path

from slzo.tasks.base import HubSource, Split
from slzo.tasks.fields import Fields, label_names, with_names
from slzo.utils.console import rank_zero_info
from slzo.utils.errors import SlzoError, one_line
from slzo.utils.hub import causes, commit_of, known_problem


def read_hub(source: HubSource, split: Split, option: str) -> tuple[str, Iterable[Fields], str | None]:
    """Return the name of a data set's split, for messages, its rows, and the commit that was loaded, ``None`` if it is unknown.

    Error messages begin with ``option``, an option and its value.

    Raises:
        SlzoError: The Hub does not have it, needs a login, or cannot be reached, and it is not in the cache.
    """
    name = source.train if split == "train" else source.test
    origin = f"{source.path}{f' ({source.config})' if source.config else ''} split {name!r}"
    if not sys.stderr.isatty():  # on a terminal, datasets shows bars
        rank_zero_info(f"Loading {origin} from the Hub")
    try:
        import datasets
        import huggingface_hub

        wanted = source.revision
        if wanted is not None and commit_of(Path(wanted)) is None:
            wanted = str(huggingface_hub.HfApi().dataset_info(source.path, revision=wanted).sha)
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
    files = getattr(rows, "cache_files", None)
    commit = commit_of(Path(files[0]["filename"]).parent) if files else None
    if wanted is not None and commit not in (None, wanted):  # offline, datasets takes what is in its cache
        raise SlzoError(
            f"data.hub_path '{source.path}@{source.revision}': only commit {commit} is in the cache, and the Hub cannot be "
            "reached; connect to the network once, or give that commit"
        )
    names = label_names(getattr(rows, "features", None))
    return origin, (with_names(row, names) for row in rows), commit
