"""Atomic file writes: a file appears under its name only when all of it is on the disk."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slzo.utils.errors import SlzoError
from slzo.utils.signals import signals_held

PARTIAL = ".slzo-partial"
"""Suffix of the hidden folders in which files are written."""


def expanded(path: str | Path) -> Path:
    """Return a path with the user's home folder for ``~``, and values for variables such as ``$SCRATCH``."""
    return Path(os.path.expandvars(path)).expanduser()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file or folder that replaces ``path`` when the context ends, flushed to the disk; an error leaves nothing behind.

    Yields:
        The path to write: one of the same name in a hidden folder next to ``path``, on the same disk. A killed process leaves the
        folder behind, and :func:`remove_leftovers` removes it.

    Raises:
        SlzoError: It cannot be written; the old content of ``path`` is unchanged.
    """
    target = _target(path)
    try:
        if _is_device(target):
            yield target
            return
        with hidden_folder(target) as folder:
            partial = folder / target.name
            yield partial
            _flush(partial)
            partial.replace(target)
            _flush_one(target.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_inside(option: str, name: str, advice: str) -> None:
    """Check that a name, which may contain folders, does not lead out of the folder to which it is added.

    Raises:
        SlzoError: It does; the message ends with ``advice``.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise SlzoError(
            f"{option} {name!r}: leads out of its folder; give a name without a leading slash and .., and {advice}"
        )


def check_writable(path: str | Path) -> None:
    """Check before long work that :func:`replacing` can write to ``path``.

    Raises:
        SlzoError: It cannot.
    """
    target = _target(path)
    try:
        if not _is_device(target):
            with hidden_folder(target):
                pass
    except OSError as error:
        raise _cannot_write(path, error) from error


def output_file(path: str | Path, example: str) -> Path:
    """Return the path of a file that a command will write, given as its option ``output``.

    Raises:
        SlzoError: It is not a file, or cannot be written.
    """
    found = expanded(path)
    if not str(path) or found.is_dir():
        raise SlzoError(f"output {str(path)!r}: not a file; give one such as {example}")
    check_writable(found)
    return found


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, UTF-8; see :func:`replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write primitives as indented JSON, with null for numbers that are not finite; see :func:`replacing`."""
    write_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by ``None``."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    return [finite(value) for value in content] if isinstance(content, list | tuple) else content


def read_json(path: str | Path, advice: str | None = None) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no such file.

    ``advice`` is what to do about a damaged file; without it, such a file and one that cannot be read count as empty.

    Raises:
        SlzoError: The file cannot be read or holds no object, and there is advice.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("not a JSON object")
    except (OSError, ValueError, TypeError) as error:
        if advice is None or isinstance(error, FileNotFoundError):
            return {}
        reason = str(error)
        if isinstance(error, OSError):  # the file may be intact
            reason, advice = str(error.strerror), "check its permissions and the disk"
        raise SlzoError(f"{str(path)!r}: cannot be read ({reason}); {advice}") from error
    return content


def copy_file(source: str | Path, path: str | Path) -> None:
    """Copy a file; see :func:`replacing`."""
    with replacing(path) as partial:
        shutil.copyfile(source, partial)


def remove_folder(folder: str | Path) -> None:
    """Remove a folder and its content as far as possible, with signals held.

    If ``rmtree`` is interrupted while it closes a folder, it closes the folder again, and that error would hide the interrupt.
    """
    with signals_held():
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove hidden folders that killed processes left in a folder; those of running processes are locked and stay."""
    for hidden in Path(folder).glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError), _locked(hidden) as locked:
            if locked:
                remove_folder(hidden)


def _cannot_write(path: str | Path, error: OSError) -> SlzoError:
    return SlzoError(
        f"{str(path)!r}: cannot be written ({error.strerror or error}), and its old content is unchanged; free space, fix the "
        "permissions, or choose another folder"
    )


def _target(path: str | Path) -> Path:
    """Return the path to write: links are followed, not replaced. A pipe, such as /dev/stdout may be, has no other path."""
    found = Path(path)
    return found if _is_device(found) else found.resolve()


def _is_device(path: Path) -> bool:
    """Whether a path is a pipe or a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextlib.contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder next to a path; it is removed when the context ends, or later if this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=PARTIAL, dir=path.parent))
        with _locked(folder) as locked:
            if locked is False or not folder.exists():  # another process has just taken it for a leftover
                continue
            try:
                yield folder
            finally:
                remove_folder(folder)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder and yield whether that worked; ``None`` if there are no locks. A lock ends with its process."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another process has just removed it
        yield False
        return
    try:
        locked: bool | None = True
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked = False
        except OSError:  # some network file systems
            locked = None
        yield locked
    finally:
        os.close(number)


def _flush(path: Path) -> None:
    """Flush a file, or a folder with its content, to the disk."""
    for child in path.iterdir() if path.is_dir() else ():
        _flush(child)
    _flush_one(path)


def _flush_one(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def check_local(option: str, path: object) -> None:
    """Refuse the address of another file system, such as ``s3://bucket``; ``None`` is no path.

    Raises:
        SlzoError: ``path`` is such an address.
    """
    if "://" in str(path):
        raise SlzoError(
            f"{option} {str(path)!r}: is not a folder of this machine; give one, and copy the run afterwards"
        )


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Convert errors of files and folders within the context to SlzoErrors.

    Raises:
        SlzoError: Instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the operating system
            raise
        if isinstance(error, BrokenPipeError):
            raise SlzoError("standard output: was closed while the command ran; write it to a file instead") from error
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
            raise SlzoError(f"network: {error.strerror}; check the connection, and give the command again") from error
        where = "a file" if error.filename is None else repr(os.fsdecode(error.filename))
        if isinstance(error, FileNotFoundError):
            raise SlzoError(f"{where}: does not exist, or was removed while the command ran; check the path") from error
        raise SlzoError(
            f"{where}: cannot be used ({error.strerror}); free space or fix the permissions there, or choose another folder "
            "(trainer.logger.save_dir, output, SLZO_CACHE); to continue, give slzo fit --ckpt_path last"
        ) from error
