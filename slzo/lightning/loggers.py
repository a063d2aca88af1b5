"""Loggers with one folder per run, and the folder of a run for a command."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.checkpoints.find import RUNS
from slzo.utils.console import is_first_process
from slzo.utils.errors import SlzoError
from slzo.utils.files import check_inside, check_local, disk_errors, expanded, remove_folder, remove_leftovers
from slzo.utils.run_layout import CHECKPOINTS_FOLDER

_SET_FOLDER = "set the folder with trainer.logger.save_dir"


class _OwnFolder(Logger):
    """A logger that makes its folder when a run begins, so that no other run gets the same one."""

    _given = False
    _taken: int | str | None = None

    def take_version(self) -> None:
        """Make the folder of the version, or of the next one that is free."""
        if self._taken is None:
            self._taken = _take(self.root_dir, super().version, self._given)  # type: ignore[safe-super, arg-type]

    @property
    def version(self) -> int | str:
        """The version, or the next one before a run begins."""
        return super().version if self._taken is None else self._taken  # type: ignore[safe-super, return-value]


class RunLogger(_OwnFolder, TensorBoardLogger):
    """Lightning's TensorBoardLogger; it makes its folder when a run begins, so that no other run gets the same one.

    Args:
        save_dir: Folder above the runs.
        name: Folder between ``save_dir`` and the run's folder; empty for none.
        version: Version of the run, a number or a name; by default the next one.
        options: Other arguments of :class:`lightning.pytorch.loggers.TensorBoardLogger`.

    Raises:
        SlzoError: ``save_dir`` is not a local folder.
    """

    def __init__(self, save_dir: str = RUNS, name: str = "", version: int | str | None = None, **options: Any) -> None:
        check_local("trainer.logger.save_dir", save_dir)
        # TensorBoardLogger would do so for some of its files only
        super().__init__(str(expanded(save_dir)), name, version, **{"default_hp_metric": False, **options})
        self._given = version is not None


class FolderLogger(_OwnFolder, CSVLogger):
    """Provides the folder of a run for its config, profile, summary and checkpoints; logs nothing.

    Args:
        save_dir: Folder above the runs.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(str(expanded(save_dir)), "")

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...


@contextmanager
def run_folder(trainer: Trainer, known: set[Path], begun: int = 0) -> Iterator[None]:
    """Make the folder of a run for a command, and remove it if the command was refused or left it empty.

    Args:
        trainer: Its loggers name the folder.
        known: Folders of earlier commands of this trainer, which are used again and never removed. A new one is added.
        begun: Step at which the run starts; an error at this step means that the command was refused.

    Raises:
        SlzoError: The folder, or another file that the command needs, cannot be read or written.
    """
    made: list[Path] = []
    try:
        with disk_errors():
            for logger in trainer.loggers:
                if (folder := _folder_of(logger, known.union(made))) is not None:
                    made.append(folder)
            known.update(made)
            yield
    except (SlzoError, MisconfigurationException):
        if trainer.global_step <= begun:
            for folder in made:
                remove_folder(folder)
                with suppress(OSError):  # it contains other runs
                    folder.parent.rmdir()
            known.difference_update(made)
        raise
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def log_dir_of(trainer: Trainer) -> str | None:
    """Return the folder of a run whose logger has none, such as W&B's or MLflow's. A collective call.

    ``None`` if the logger has a folder.
    """
    logger = trainer.logger
    if logger is None or isinstance(logger, TensorBoardLogger | CSVLogger):
        return None
    if trainer.is_global_zero:
        _ = getattr(logger, "experiment", None)  # without it the logger has no name and version
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
    return str(trainer.strategy.broadcast(str(folder)))


def _folder_of(logger: object, taken: Collection[Path]) -> Path | None:
    """Make and return the folder of a logger; ``None`` if it has none, if it is taken, or if another process makes it."""
    # before there is a process group, the trainer alone knows the number of its machine
    makes_folders = is_first_process() and getattr(rank_zero_only, "rank", 0) == 0
    if not isinstance(logger, TensorBoardLogger | CSVLogger) or not makes_folders:
        return None
    check_inside("trainer.logger.name", str(logger.name or ""), _SET_FOLDER)
    if isinstance(logger, _OwnFolder):
        logger.take_version()
    folder = Path(logger.log_dir)
    # the run of another trainer with this logger has files
    if folder in taken or (isinstance(logger, _OwnFolder) and folder.is_dir() and any(folder.iterdir())):
        return None
    if not isinstance(logger, _OwnFolder):  # Lightning's own loggers make theirs later
        _take(logger.root_dir, logger.version, given=True)
    for run in folder.parent.glob("version_*"):
        remove_leftovers(run)
        remove_leftovers(run / CHECKPOINTS_FOLDER)
    return folder


def _take(root: str, version: int | str, given: bool) -> int | str:
    """Make the folder of a version, or of the next version that is free, and return the version.

    Raises:
        SlzoError: The folder cannot be made, or a given version already exists.
    """
    check_inside("trainer.logger.version", str(version), _SET_FOLDER)
    folder = expanded(root)
    while True:
        own = folder / (version if isinstance(version, str) else f"version_{version}")
        try:
            own.mkdir(parents=True)
        except FileExistsError as error:
            if given or isinstance(version, str):
                raise SlzoError(
                    f"trainer.logger.version {version!r}: {str(own)!r} exists; give another version, leave it out to get "
                    "the next one, or make a new logger for another run"
                ) from error
            version += 1
        except OSError as error:
            raise SlzoError(
                f"trainer.logger.save_dir {str(folder)!r}: cannot make a folder for the run there ({error.strerror}); give "
                "another folder"
            ) from error
        else:
            return version
