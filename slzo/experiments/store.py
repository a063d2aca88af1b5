"""A folder of results, one file a cell: interrupted work goes on, and several processes share it out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slzo.errors import SlzoError

_SETTINGS_FILE = "settings.json"


class CellStore:
    """Results by name.

    Args:
        folder: Made if it does not exist.
        settings: What the results depend on, primitives only.
        option: The option that names the folder, for messages.

    Raises:
        SlzoError: The folder holds results of other settings, or other files.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], option: str = "output") -> None:
        self.folder = Path(folder).expanduser()
        path = self.folder / _SETTINGS_FILE
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            _compare(json.loads(path.read_text(encoding="utf-8")), settings, self.folder, option)
        elif self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir())):
            raise SlzoError(f"{option} {str(self.folder)!r}: holds other files; give a new folder, or one to continue")
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        _write(path, settings)

    def result(self, name: str) -> Any:
        """A finished cell's result, or ``None``."""
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save(self, name: str, result: Any) -> None:
        """Keep a cell's result."""
        _write(self._path(name), result)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether the caller shall work on a cell: nobody has finished it or is at it.

        The lock goes with the process, so a killed one blocks nothing.
        """
        lock = FileLock(self._path(name).with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield self.result(name) is None
        finally:
            lock.release()

    def _path(self, name: str) -> Path:
        return self.folder / "cells" / f"{name}.json"


def _compare(old: dict[str, Any], new: dict[str, Any], folder: Path, option: str) -> None:
    different = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if different:
        changes = "; ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in different)
        raise SlzoError(
            f"{option} {str(folder)!r}: holds results of other settings ({changes}); give another folder or the same settings"
        )


def _write(path: Path, content: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
