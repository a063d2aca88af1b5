"""Whole files or none: what slzo writes appears under its name when all of it is on the disk, and not before."""

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a Unix: leftovers are kept there
    fcntl = None  # type: ignore[assignment]

from slzo.utils.errors import SlzoError
from slzo.utils.signals import signals_held

PARTIAL = ".slzo-partial"
"""How the names of hidden folders end in which files are written."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file or a folder that takes the place of ``path`` at the end, flushed to the disk; after an error nothing is left.

    Yields:
        Where to write it: a path of the same name in a hidden folder beside ``path``, on the same disk. A killed process leaves
        that folder, and :func:`remove_leftovers` takes it away.

    Raises:
        SlzoError: It cannot be written; what was at ``path`` is as it was.
    """
    target = Path(path).resolve()  # a link stays one
    try:
        if target.exists() and not target.is_file() and not target.is_dir():  # a pipe or a device
            yield target
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with _hidden_folder(target) as folder:
            partial = folder / target.name
            yield partial
            _flush(partial)
            partial.replace(target)
            _flush_names(target.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_writable(path: str | Path) -> None:
    """Find out before long work whether :func:`replacing` can write something at ``path``.

    Raises:
        SlzoError: It cannot.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file() and not target.is_dir():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _hidden_folder(target):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, UTF-8; see :func:`replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write primitives as indented JSON; see :func:`replacing`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def copy_file(source: str | Path, path: str | Path) -> None:
    """Copy a file; see :func:`replacing`."""
    with replacing(path) as partial:
        shutil.copyfile(source, partial)


def remove_folder(folder: str | Path) -> None:
    """Remove a folder and what is in it, as far as that can be done; Ctrl-C waits.

    Interrupted where it closes a folder, ``rmtree`` closes it once more, and that error takes the place of the interrupt.
    """
    with signals_held():
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed processes left in a folder; what a living one is at stays."""
    for hidden in Path(folder).glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError), _locked(hidden) as mine:
            if mine:
                remove_folder(hidden)


def _cannot_write(path: str | Path, error: OSError) -> SlzoError:
    return SlzoError(
        f"{str(path)!r} cannot be written ({error.strerror or error}): what was there before is whole; make room or rights, "
        "or choose another folder"
    )


@contextlib.contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    remove_leftovers(path.parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=PARTIAL, dir=path.parent))
        with _locked(folder) as mine:
            if mine is False or not folder.exists():  # another process took it for a leftover just now
                continue
            try:
                yield folder
            finally:
                remove_folder(folder)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Whether the caller has a folder for itself; ``None`` where locks do not work. The lock goes with the process."""
    if fcntl is None:
        yield None
        return
    try:
        number = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another process has just removed it
        yield False
        return
    try:
        mine: bool | None = True
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError:  # some network file systems
            mine = None
        yield mine
    finally:
        os.close(number)


def _flush(path: Path) -> None:
    """Have the disk hold a file, or a folder and all that is in it."""
    if path.is_dir():
        for child in path.iterdir():
            _flush(child)
        _flush_names(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """Have the disk hold a folder's names."""
    if os.name != "posix":  # folders cannot be opened elsewhere
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn errors of files and folders into one line.

    Raises:
        SlzoError: In the place of an OSError.
    """
    if threading.excepthook is threading.__excepthook__:  # it stays: a thread may need it when all is over
        threading.excepthook = _report_thread_error
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not of the operating system: a library's own
            raise
        where = "a file" if error.filename is None else repr(os.fsdecode(error.filename))
        raise SlzoError(
            f"{where} cannot be used ({error.strerror}): make room or rights there, or choose another folder "
            "(trainer.logger.save_dir, output, SLZO_CACHE); --ckpt_path last goes on from the last checkpoint"
        ) from error


def _report_thread_error(args: Any) -> None:
    """Report what ended a thread, but not errors of files: TensorBoard's thread hands them to the main one."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)
