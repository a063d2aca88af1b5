"""A folder of results, one file a cell: interrupted work goes on, and several processes share it out."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slzo.utils.errors import SlzoError
from slzo.utils.files import PARTIAL, write_json
from slzo.utils.settings import differences

_SETTINGS_FILE = "settings.json"


class CellStore:
    """Results by name.

    Args:
        folder: Made if it does not exist.
        settings: What the results depend on, primitives only.
        open_settings: Settings that some work does not depend on and leaves at ``None``; work that does sets them for the folder.

    Raises:
        SlzoError: The folder holds results of other settings, or other files.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], open_settings: Collection[str] = ()) -> None:
        self.folder = Path(folder).expanduser()
        path = self.folder / _SETTINGS_FILE
        settings = json.loads(json.dumps(settings))
        if path.is_file() and any((self.folder / "cells").glob("*.json")):
            old = json.loads(path.read_text(encoding="utf-8"))
            # a folder of another kind may know nothing of them
            opened = {name: old.get(name) for name in open_settings}
            if all(settings[name] is None for name in open_settings):
                settings |= opened
            elif all(value is None for value in opened.values()):
                old |= {name: settings[name] for name in open_settings}
            changes = differences(old, settings)
            if changes:
                raise SlzoError(
                    f"output {str(self.folder)!r}: holds results of other settings ({changes}); give another folder or the "
                    "same settings"
                )
        # a process that starts at the same time may be at writing its own
        files = [self.folder] if self.folder.is_file() else self.folder.glob("*")
        if any(file.suffix != PARTIAL for file in files) and not path.is_file():
            raise SlzoError(f"output {str(self.folder)!r}: holds other files; give a new folder, or one to continue")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
            (self.folder / "cells").mkdir(exist_ok=True)
        except OSError as error:
            raise SlzoError(
                f"output {str(self.folder)!r}: cannot be written ({error.strerror}); give another folder"
            ) from error

    def result(self, name: str) -> Any:
        """A finished cell's result, or ``None``."""
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save(self, name: str, result: Any) -> None:
        """Keep a cell's result."""
        write_json(self._path(name), result)

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
