"""Run reward functions in a worker process with a time limit; after a failure it is started again."""

import os
import pickle
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

from slzo.rewards.calls import RewardCall, RewardFailure, RewardInputs
from slzo.rewards.worker import LENGTH, write_frame
from slzo.utils.errors import Interrupted, SlzoError

_LOADING_SECONDS = 120.0


class RewardProcess:
    """Calls reward functions in a separate process, which is killed with its child processes when it takes too long.

    Args:
        functions: The functions to call.
        timeout: Time limit of a call, in seconds, for all functions together.
    """

    def __init__(self, functions: Sequence[RewardCall], timeout: float) -> None:
        self.functions = list(functions)
        self.timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Any = None

    def load(self) -> None:
        """Start the process if it is not running, and load the functions.

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
            start_new_session=True,  # it can be killed with its children, and Ctrl-C does not reach it
        )
        self._stop = weakref.finalize(self, _kill, self._process)
        try:
            problem = self._ask(self.functions, _LOADING_SECONDS)
        except RewardFailure as failure:
            raise SlzoError(f"data.reward {failure.function}: {failure.reason} while its file was loaded") from None
        if problem is not None:
            self.kill()
            raise SlzoError(f"data.reward {problem[0]!r}: {problem[1]}")

    def __call__(self, answers: RewardInputs) -> list[list[float]]:
        """Return one number per answer for each function.

        Raises:
            RewardFailure: A function failed, ended the process or took too long; in the last two cases the process is gone.
            Interrupted: A function raised KeyboardInterrupt.
        """
        self.load()
        reply = self._ask(answers, self.timeout)
        if isinstance(reply, tuple):
            raise RewardFailure(*reply)
        if isinstance(reply, int):
            raise Interrupted(reply)
        return list(reply)

    def kill(self) -> None:
        """Kill the process."""
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
            length = LENGTH.unpack(self._read(LENGTH.size, until))[0]
            return pickle.loads(self._read(length, until))
        except TimeoutError:
            self.kill()
            raise RewardFailure(names, f"took longer than {limit:g} s (timeout) and was stopped") from None
        except (OSError, EOFError):
            process = self._process
            try:
                status = process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.kill()
                raise RewardFailure(names, "closed its connection to slzo, but did not end") from None
            self.kill()
            how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
            raise RewardFailure(names, f"ended the reward process {how}") from None
        except BaseException:  # an interrupt: the next request would read the reply to this one
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
            except OSError:  # buffered data cannot be written
                continue
