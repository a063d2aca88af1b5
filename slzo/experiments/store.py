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

_SETTINGS_FILE = "settings.json"
_REMOVE = "remove it, and run the same command again"
_WAIT_SECONDS = 2.0

# settings that are hashes, and what it means if they differ
_HASHES = {
    "train rows": "other training rows, see data.num_train, data.num_dev, data.seed and the files",
    "dev rows": "other dev rows",
    "tokenizer": "another tokenizer",
    "weights": "other weights of the model",
    "reward code": "other code of data.reward",
}


class CellStore:
    """Results of cells, by name.

    Args:
        folder: Folder of the results; it is created if it does not exist.
        settings: Settings that the results depend on, primitives only.

    Raises:
        SlzoError: The folder holds results of other settings or other files, or cannot be written.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = expanded(folder)
        self._settings = json.loads(json.dumps(settings))
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
        _refuse_changes(self.folder, read_json(self.folder / _SETTINGS_FILE, _REMOVE), self._settings)

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


def check_results(folder: str | Path, known: Mapping[str, Any]) -> None:
    """Check the settings that are known so far, before the others are found out; see :class:`CellStore`.

    Raises:
        SlzoError: The folder holds results of other settings.
    """
    folder, now = expanded(folder), json.loads(json.dumps(known))
    path = folder / _SETTINGS_FILE
    if path.is_file() and _is_used(folder):
        before = read_json(path, _REMOVE)
        _refuse_changes(folder, {name: before.get(name) for name in now}, now)


def _refuse_changes(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if before != now and (changes := changed_options(before, now)):
        raise SlzoError(
            f"output {str(folder)!r}: holds results of other settings ({changes}); give another folder, or the settings, rows "
            "and weights of before"
        )


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the settings of a sweep that differ, as text: ``model.eps: 0.001 -> 0.002``.

    The arguments of a class that differs are left out, and so are hashes.
    """
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    hashes = [text for name, text in _HASHES.items() if name in changed]
    names = {name: name for name in changed - _HASHES.keys() if name.rpartition(".")[0] not in changed}
    seeds = ("model.seed", "data.seed")
    if changed.issuperset(seeds) and all(side.get(seeds[0]) == side.get(seeds[1]) for side in (old, new)):
        names["model.seed"] = "seed_everything (or model.seed and data.seed)"
        del names["data.seed"]
    values = sorted(f"{text}: {old.get(name)} -> {new.get(name)}" for name, text in names.items())
    return "; ".join([*values, *hashes])


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
