"""Download a wheel with ``pip download``, with errors that say what went wrong."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from slzo.utils.console import print_status
from slzo.utils.errors import SlzoError

_POLL_SECONDS = 5.0
_TIMEOUT_SECONDS = 15


def download_wheel(package: str, version: str, folder: Path, advice: str) -> Path:
    """Download a wheel without its dependencies, report the size so far every few seconds, and return its path.

    The folder is empty, and takes pip's temporary files too. ``advice`` ends the message of an error.

    Raises:
        SlzoError: Pip is missing or failed.
        OSError: The disk is full.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    # without a network this fails within a minute; users may set a longer timeout for slow mirrors
    if not {"PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT"} & os.environ.keys():
        command += ["--timeout", str(_TIMEOUT_SECONDS)]
    command += ["download", "--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    command += ["--dest", str(folder), f"{package}=={version}"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    status, output = run_pip(command, environment, lambda: print_status(f"  {_size(folder) / 1e6:.0f} MB"))
    if os.strerror(errno.ENOSPC) in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wheels = list(folder.glob("*.whl"))
    if status == 0 and wheels:
        return wheels[0]
    reason = reason_of(output) or f"pip ended with status {status}"
    if "No module named pip" in output:
        reason = "pip is not installed in this Python environment"
        advice = "run `python -m ensurepip` (in a uv environment `uv pip install pip`) and try again"
    raise SlzoError(f"could not fetch {package} {version} from PyPI ({reason}); {advice}")


def run_pip(command: list[str], environment: Mapping[str, str], on_wait: Callable[[], None]) -> tuple[int, str]:
    """Run pip and return its exit status and its output, with both streams in one text."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    on_wait()
                else:
                    return process.returncode, output
        except BaseException:
            process.kill()
            raise


def reason_of(output: str) -> str:
    """Return the part of pip's output that says why it failed, in one line; empty if there is none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # if the network is down, pip ends with "No matching distribution" only
    for line in reversed(lines):
        if match := re.search(r"connection broken by '(.*)'(?:: \S*)?$", line):
            cause = re.sub(r"<[^<>]*>: ?|^\w+\(|[\"')]+$", "", match[1])
            return cause.lstrip("\"', ")[:200]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1].removeprefix("ERROR:").strip()[:200] if errors else ""


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip removed it in the meantime
            continue
    return total
