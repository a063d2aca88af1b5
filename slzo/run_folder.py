"""The folder of a run: each command gets one of its own, and faults of the disk are told in one line."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.errors import SlzoError
from slzo.files import remove_folder, remove_leftovers


@contextmanager
def run_folder(trainer: Trainer, begun: int = 0) -> Iterator[None]:
    """Around a command: claims the next version, and removes it where the command was refused or left it empty.

    Args:
        trainer: Whose loggers name the folder.
        begun: Step that a refused command has not gone beyond.

    Raises:
        SlzoError: The folder, or another file that the command needs, cannot be read or written.
    """
    claimed = [folder for logger in trainer.loggers if (folder := _claim(trainer, logger)) is not None]
    try:
        with disk_faults_in_one_line():
            yield
    except (SlzoError, MisconfigurationException):
        if trainer.global_step <= begun:
            for folder in claimed:
                remove_folder(folder)
                with suppress(OSError):  # other runs are in it
                    folder.parent.rmdir()
        raise
    finally:
        for folder in claimed:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def folder_of_run(trainer: Trainer) -> str | None:
    """The folder of a run whose logger, such as W&B's or MLflow's, has none: that in which Lightning keeps its checkpoints.

    ``None`` where the logger names one itself. Asks all processes.
    """
    logger = trainer.logger
    if logger is None or isinstance(logger, TensorBoardLogger | CSVLogger):
        return None
    if trainer.is_global_zero:
        _ = getattr(logger, "experiment", None)  # it has no name and version before
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
    return str(trainer.strategy.broadcast(str(folder)))


@contextmanager
def disk_faults_in_one_line() -> Iterator[None]:
    """Turn errors of files and folders into one line.

    Raises:
        SlzoError: In the place of an OSError.
    """
    if threading.excepthook is threading.__excepthook__:  # it stays: the thread may come to it when all is over
        threading.excepthook = _tell_bugs
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the operating system: a library's own
            raise
        where = "a file" if error.filename is None else repr(str(error.filename))
        raise SlzoError(
            f"{where} cannot be used ({error.strerror}): make room or rights there, or choose another folder "
            "(trainer.logger.init_args.save_dir, output, SLZO_CACHE); --ckpt_path last goes on from the last checkpoint"
        ) from error


def _tell_bugs(args: Any) -> None:
    """Report what ended a thread, but not errors of files: TensorBoard's thread hands them to the main one, which tells them."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _claim(trainer: Trainer, logger: object) -> Path | None:
    """Make the folder of the next version, which no other process has then; ``None`` where there is nothing to claim."""
    if not isinstance(logger, TensorBoardLogger | CSVLogger) or logger._version is not None:
        return None
    if not trainer.is_global_zero or not _is_local_file_protocol(logger.root_dir):
        return None
    root = Path(os.path.expandvars(logger.root_dir)).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        version = logger._get_next_version()
        while not _made(root / f"version_{version}"):
            version += 1
    except OSError as error:
        raise SlzoError(
            f"trainer.logger.init_args.save_dir {str(root)!r}: no folder for the run can be made there ({error.strerror}); "
            "give another one"
        ) from error
    logger._version = version
    for run in root.glob("version_*"):
        remove_leftovers(run)
        remove_leftovers(run / "checkpoints")
    return root / f"version_{version}"


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True
