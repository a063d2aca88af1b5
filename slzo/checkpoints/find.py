"""Finds the checkpoints of runs: the last and the best one of the newest run, or of a given one."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from slzo.checkpoints.checkpoint import Checkpoint, read_checkpoint, run_folder_of
from slzo.utils.console import rank_zero_info, rank_zero_print, rank_zero_warn
from slzo.utils.environment import program_line
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded, read_json
from slzo.utils.run_layout import CHECKPOINTS_FOLDER, ENVIRONMENT_FILE

REPLAYED = "replay-"
"""Beginning of the names of checkpoints that were rebuilt from a log."""

NAMES = ("last", "best")
"""Names that stand for the last and the best checkpoint of the newest run."""

RUNS = "runs"
"""Folder above the runs."""

_LAST = re.compile(r"last(-v\d+)?\.ckpt")


def newest_checkpoint(root: str | Path, name: str = "last") -> Checkpoint:
    """Read the last checkpoint of the newest run below ``root``.

    If it is missing or cannot be used, report it and read the newest intact one, of the same run if that has any, and one from
    which training can be resumed if there is one. ``root`` is a folder of runs, or of one run; ``name`` is what the user gave as
    ``ckpt_path``, for messages.

    Raises:
        SlzoError: There is no intact checkpoint.
    """
    files = (file for folder in _folders_below(root) for file in folder.glob("checkpoints/*.ckpt"))
    times = {path: _modified(path) for path in files}
    known = {path: time for path, time in times.items() if time is not None and not path.name.startswith(REPLAYED)}
    found = sorted(known, key=known.__getitem__, reverse=True)
    if not found:
        raise SlzoError(
            f"ckpt_path {name!r}: no run below {str(root)!r} has a checkpoint; run slzo fit without --ckpt_path, or give "
            "a file"
        )
    newest = found[0].parent
    _warn_of_newer_run(Path(root), newest.parent, known[found[0]])
    last = next((path for path in found if path.parent == newest and _LAST.fullmatch(path.name)), None)
    if last is None:
        rank_zero_warn(f"ckpt_path {name!r}: {str(newest)!r} has no last.ckpt")
    elif (read := _readable(last)) is not None:
        return read
    others = sorted((path for path in found if path != last), key=lambda path: path.parent != newest)
    chosen: Checkpoint | None = None
    for path in others:
        # rather weights of this run than another run
        if chosen is not None and path.parent != Path(chosen.path).parent:
            break
        read = _readable(path)
        chosen = chosen or read
        if read is not None and read.is_resumable:
            chosen = read
            break
    if chosen is None:
        raise SlzoError(
            f"ckpt_path {name!r}: no checkpoint below {str(root)!r} is intact; run slzo fit without --ckpt_path, or give a "
            "file"
        )
    rank_zero_info(f"{chosen.path} is the newest intact checkpoint")
    return chosen


def _readable(path: Path) -> Checkpoint | None:
    """Read a checkpoint; if it cannot be used, warn and return ``None``."""
    try:
        return read_checkpoint(path)
    except SlzoError as error:
        rank_zero_warn(str(error))
        return None


def _warn_of_newer_run(root: Path, run: Path, saved: float) -> None:
    """Warn of a run that started after ``run`` had ``saved`` its newest checkpoint, and has none itself."""
    times = ((_modified(folder / ENVIRONMENT_FILE), folder) for folder in _folders_below(root))
    newer = [(time, folder) for time, folder in times if time is not None and time > saved and folder != run]
    if newer:
        rank_zero_warn(f"{str(max(newer)[1])!r} is newer and has no checkpoint")


def _folders_below(root: str | Path) -> Iterator[Path]:
    """Yield a folder and all below it.

    Unlike ``Path.rglob`` this does not fail if one disappears, such as the hidden one of a file that another process writes.
    """
    return (Path(folder) for folder, _, _ in os.walk(root))


def _modified(path: Path) -> float | None:
    """Return when a file was changed; ``None`` if it is gone or a broken link."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def named_checkpoint(name: str, root: str | Path) -> tuple[Checkpoint, Path]:
    """Read the checkpoint of the newest run below ``root`` that has the name, see :data:`NAMES`; print its path.

    Returns:
        The checkpoint, and the folder of its run. The best one may be elsewhere (``checkpoint.dirpath``).

    Raises:
        SlzoError: There is none.
    """
    found = newest_checkpoint(root, name)
    folder = found.run_folder
    if name == "best":
        if (best := _best_of(found)) is None:
            raise SlzoError(
                f"ckpt_path 'best': the run of {found.path!r} has no best one: it was not validated, all validations led to "
                "rollbacks, or the file is gone; give last"
            )
        found = read_checkpoint(best)
    rank_zero_print(f"Using the {name} checkpoint of the newest run, {found.path}")
    return found, folder


def find_checkpoint(ckpt_path: str | Path, root: str | Path, to_continue: bool = False) -> Checkpoint:
    """Read a checkpoint, given by its path, by the folder of its run, or by a name, see :func:`named_checkpoint`.

    For a run's folder, the best checkpoint is read; if the run was not validated, or with ``to_continue``, the last one.

    Raises:
        SlzoError: There is none, or it cannot be used.
    """
    if str(ckpt_path) in NAMES:
        return named_checkpoint(str(ckpt_path), root)[0]
    if not str(ckpt_path):
        raise SlzoError("ckpt_path '': is empty; give a checkpoint, the folder of a run, last or best")
    path = expanded(ckpt_path)
    if (path / CHECKPOINTS_FOLDER).is_dir():
        last = newest_checkpoint(path, str(path))
        best = None if to_continue else _best_of(last)
        return last if best is None else read_checkpoint(best)
    return read_checkpoint(path)


def _best_of(last: Checkpoint) -> Path | None:
    """Return the best checkpoint that the last one refers to; after a resume it may be in the folder of the earlier run."""
    states = [state for state in last.content.get("callbacks", {}).values() if isinstance(state, dict)]
    # as with Lightning, "best" is that of the first callback that saves; others may watch another metric
    saved = next((state["best_model_path"] for state in states if "best_model_path" in state), None)
    if not saved:
        return None
    path = best_file(saved, last.path)
    if path.is_file():
        return path
    rank_zero_warn(f"{last.path}: its best checkpoint {str(path)!r} is missing")
    return None


def best_file(saved: str, checkpoint: str | Path) -> Path:
    """Return the file of a best state, or ``saved`` if no place has it.

    A relative path was saved by the checkpoint's own run. It counts from the folder in which that run was started, which may hold
    another project's runs now, so the file is looked for next to the checkpoint. A run that continues another one saves an
    absolute path; its folders may have been moved together. If the checkpoint is a copy outside a run, the path is relative to
    the current folder.

    Args:
        saved: Path of the best state in a checkpoint.
        checkpoint: Path of this checkpoint, of the same run or of one that continued it.
    """
    path, folder = Path(saved), Path(checkpoint).parent
    places = [folder / path.name, run_folder_of(checkpoint).parent.joinpath(*path.parts[-3:])]
    if path.is_absolute():
        places.insert(0, path)
    elif folder.name != CHECKPOINTS_FOLDER:
        places.append(path)
    return next((place for place in places if place.is_file()), path)


def checkpoint_of_job(root: str | Path, job: str) -> Checkpoint | None:
    """Read the last checkpoint of the newest run below ``root`` that this command of a SLURM job wrote, or ``None``."""
    mine = (job, program_line())  # a job may run several commands
    found = [folder for folder in _folders_below(root) if _job_of(folder / ENVIRONMENT_FILE) == mine]
    found = [folder for folder in found if any((folder / CHECKPOINTS_FOLDER).glob("*.ckpt"))]
    if not found:
        return None
    checkpoint = newest_checkpoint(max(found, key=lambda folder: (folder / ENVIRONMENT_FILE).stat().st_mtime))
    rank_zero_print(f"SLURM job {job} was restarted and continues {checkpoint.path}")
    return checkpoint


def _job_of(environment: Path) -> tuple[str, str] | None:
    """Return the SLURM job and the command of a run."""
    content = read_json(environment)  # empty while it is being written
    return (str(content["slurm_job"]), content["command"]) if {"slurm_job", "command"} <= content.keys() else None
