"""Starts the worker process, waits for it no longer than is allowed, and starts it anew."""

import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

from slzo.rewards.calls import Answers, RewardFailure, Wanted
from slzo.rewards.worker import write_frame
from slzo.utils.errors import SlzoError

_LOADING_SECONDS = 120.0
_LENGTH = struct.Struct("<Q")


class RewardProcess:
    """Calls reward functions in a process of its own, which is killed with all that it started when it takes too long.

    Args:
        functions: What it calls.
        timeout: Seconds that a call may take, for all functions together.
    """

    def __init__(self, functions: Sequence[Wanted], timeout: float) -> None:
        self.functions = list(functions)
        self.timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Any = None

    def load(self) -> None:
        """Start the process, if there is none.

        Raises:
            SlzoError: A function cannot be found.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.kill()
        paths = [os.path.abspath(path) for path in sys.path]  # noqa: PTH100 - Path would follow links
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from slzo.rewards.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # so that it can be killed with its children, and Ctrl-C does not reach it
        )
        self._stop = weakref.finalize(self, _kill, self._process)
        try:
            problem = self._ask(self.functions, _LOADING_SECONDS)
        except RewardFailure as failure:
            raise SlzoError(f"data.reward {failure.function}: {failure.reason} while its file was loaded") from None
        if problem is not None:
            self.kill()
            raise SlzoError(f"data.reward {problem[0]!r}: {problem[1]}")

    def __call__(self, answers: Answers) -> list[list[float]]:
        """For each function a number an answer.

        Raises:
            RewardFailure: A function failed, ended the process or took too long; the process has been killed then.
        """
        self.load()
        reply = self._ask(answers, self.timeout)
        if isinstance(reply, tuple):
            raise RewardFailure(*reply)
        return list(reply)

    def kill(self) -> None:
        """End the process."""
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None

    def _ask(self, request: Any, limit: float) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        names = ", ".join(one.function for one in self.functions)
        until = time.monotonic() + limit
        try:
            write_frame(self._process.stdin, (request, limit))
            length = _LENGTH.unpack(self._read(_LENGTH.size, until))[0]
            return pickle.loads(self._read(length, until))
        except TimeoutError:
            self.kill()
            raise RewardFailure(names, f"took longer than {limit:g} s (timeout) and was ended") from None
        except (OSError, EOFError):
            process = self._process
            status = process.wait(timeout=10)
            self.kill()
            how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
            raise RewardFailure(names, f"ended its process {how}") from None
        except BaseException:  # an interrupt: the reply would be taken for that of the next request
            self.kill()
            raise

    def _read(self, size: int, until: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        file, data = self._process.stdout.fileno(), bytearray()
        while len(data) < size:
            ready, _, _ = select.select([file], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            piece = os.read(file, size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # what could not be written
                continue
