"""A folder of results with one file per cell, so that interrupted work continues and several processes can share it."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slzo.utils.errors import SlzoError
from slzo.utils.files import PARTIAL, expanded, read_json, write_json
from slzo.utils.settings import differences

_SETTINGS_FILE = "settings.json"
_REMOVE = "remove it, and run the same command again"
_WAIT_SECONDS = 2.0

Describe = Callable[[Mapping[str, Any], Mapping[str, Any]], str]


class CellStore:
    """Results of cells, by name.

    Args:
        folder: Folder of the results; it is created if it does not exist.
        settings: Settings that the results depend on, primitives only.
        describe: Names the settings that differ, of those before and now.

    Raises:
        SlzoError: The folder holds results of other settings or other files, or cannot be written.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], describe: Describe = differences) -> None:
        self.folder = Path(expanded(folder))
        self._settings, self._describe = json.loads(json.dumps(settings)), describe
        path = self.folder / _SETTINGS_FILE
        if path.is_file() and _is_used(self.folder):
            self._check_settings()
        # another process that starts at the same time may be writing its settings
        files = [self.folder] if self.folder.is_file() else self.folder.glob("*")
        if any(file.suffix != PARTIAL for file in files) and not path.is_file():
            raise SlzoError(
                f"output {str(self.folder)!r}: holds other files; give a new folder, or the folder of a run to continue"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, self._settings)
            (self.folder / "cells").mkdir(exist_ok=True)
        except OSError as error:
            raise SlzoError(
                f"output {str(self.folder)!r}: cannot be written ({error.strerror}); give another folder"
            ) from error

    def _check_settings(self) -> None:
        """Raise SlzoError if the folder holds results of other settings."""
        _refuse_changes(self.folder, read_json(self.folder / _SETTINGS_FILE, _REMOVE), self._settings, self._describe)

    def result(self, name: str) -> Any:
        """Return the dict of a cell; ``None`` if the cell is not finished."""
        path = self._path(name)
        return read_json(path, _REMOVE) if path.is_file() else None

    def save(self, name: str, result: Mapping[str, Any]) -> None:
        """Write a cell's result."""
        write_json(self._path(name), result)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Lock a cell and yield whether the caller should compute it: it is not finished and no other process works on it.

        The operating system releases the lock of a killed process.

        Raises:
            SlzoError: A process with other settings has started in the folder since.
        """
        lock = FileLock(self._path(name).with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            self._check_settings()
            yield self.result(name) is None
        finally:
            lock.release()

    def complete(
        self, cells: Mapping[str, Callable[[], Any]], report: Callable[[str, Any], None] = lambda _name, _result: None
    ) -> None:
        """Compute all cells that are not finished, and wait for those that other processes compute.

        The cell of a process that has ended is computed here.

        Args:
            cells: The function of each cell, by name; it returns a dict of primitives.
            report: Called with the name and the result of a cell that was computed here.
        """
        while left := [name for name in cells if self.result(name) is None]:
            for name in left:
                with self.claim(name) as mine:
                    if mine:
                        result = cells[name]()
                        self.save(name, result)
                        report(name, result)
                        break
            else:
                time.sleep(_WAIT_SECONDS)

    def _path(self, name: str) -> Path:
        return self.folder / "cells" / f"{name}.json"


def check_results(folder: str | Path, known: Mapping[str, Any], describe: Describe = differences) -> None:
    """Check the settings that are known so far, before the others are found out; see :class:`CellStore`.

    Raises:
        SlzoError: The folder holds results of other settings.
    """
    folder, now = Path(expanded(folder)), json.loads(json.dumps(known))
    path = folder / _SETTINGS_FILE
    if path.is_file() and _is_used(folder):
        before = read_json(path, _REMOVE)
        _refuse_changes(folder, {name: before.get(name) for name in now}, now, describe)


def _refuse_changes(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], describe: Describe) -> None:
    if before != now and (changes := describe(before, now)):
        raise SlzoError(
            f"output {str(folder)!r}: holds results of other settings ({changes}); give another folder, or the settings, rows "
            "and weights of before"
        )


def _is_used(folder: Path) -> bool:
    """Return whether a cell is finished, or a process works on one."""
    cells = folder / "cells"
    return any(cells.glob("*.json")) or any(_is_locked(path) for path in cells.glob("*.lock"))


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # the folder cannot be written, which its user will find out
        return False
