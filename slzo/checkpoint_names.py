"""``last`` and ``best`` in the place of a checkpoint's path: those of the newest run."""

from pathlib import Path

from slzo.checkpoint import newest_checkpoint, read_checkpoint
from slzo.errors import SlzoError

NAMES = ("last", "best")


def named_checkpoint(name: str, root: str | Path) -> Path:
    """The checkpoint of the newest run below ``root`` that goes by a name: its last one, or the one with the best score.

    Raises:
        SlzoError: There is none.
    """
    last = newest_checkpoint(root)
    return last if name == "last" else _best_of(last)


def checkpoint_of_run(folder: str | Path) -> Path:
    """The best checkpoint of a run, given by its folder, or the last one of a run that was not validated.

    Raises:
        SlzoError: It has none.
    """
    last = newest_checkpoint(folder)
    try:
        return _best_of(last)
    except SlzoError:
        return last


def _best_of(last: Path) -> Path:
    """The best checkpoint that a run's last one remembers; a resumed run's may be in the folder of the run before."""
    callbacks = read_checkpoint(last).content.get("callbacks", {})
    told = [Path(state["best_model_path"]) for state in callbacks.values() if state.get("best_model_path")]
    for path in (place for best in told for place in (best, last.parent / best.name)):  # the runs may have been moved
        if path.is_file():
            return path
    raise SlzoError(f"ckpt_path 'best': the run of {str(last)!r} has none, it was not validated; give last")
