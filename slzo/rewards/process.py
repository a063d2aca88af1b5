"""Run reward functions in a worker process with a time limit; after a failure it is started again."""

import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from slzo.rewards.calls import AnswerBatch, RewardFailure, RewardSpec, call, load_function, required_columns
from slzo.rewards.registry import RewardFunction
from slzo.utils.errors import Interrupted, SlzoError

_LOADING_SECONDS = 120.0
_LONGEST_WAIT = 1e6  # seconds; poll() takes a number of milliseconds


class RewardProcess:
    """Calls reward functions in a separate process, which is killed with its child processes when it takes too long.

    Args:
        functions: The functions to call.
        timeout: Time limit of a call of one function, in seconds.
    """

    def __init__(self, functions: Sequence[RewardSpec], timeout: float) -> None:
        self.functions = list(functions)
        self.timeout = timeout
        self._required: list[tuple[str, ...]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._stop: Any = None

    def load(self) -> Sequence[tuple[str, ...]]:
        """Start the process if it is not running, and load the functions; return the columns that each of them requires.

        Raises:
            SlzoError: A function cannot be found.
        """
        if self._process is not None and self._process.poll() is None:
            return self._required
        self.kill()
        paths = [os.path.abspath(path) for path in sys.path]  # noqa: PTH100 - Path would follow links
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from slzo.rewards.process import serve; serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=2,  # output of a function, or of a program that it starts, goes to standard error
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # it can be killed with its children, and Ctrl-C does not reach it
            )
        self._stop = weakref.finalize(self, _kill, self._process, self._connection)
        try:
            names = ", ".join(one.function for one in self.functions)
            reply = self._ask(self.functions, _LOADING_SECONDS, names)
        except RewardFailure as failure:
            raise SlzoError(f"data.reward {failure.function}: {failure.reason} while its file was loaded") from None
        if isinstance(reply, RewardFailure):
            self.kill()
            raise SlzoError(f"data.reward {reply.function!r}: {reply.reason}")
        self._required = reply
        return reply

    def __call__(self, answers: AnswerBatch) -> list[list[float]]:
        """Return one number per answer for each function.

        Raises:
            RewardFailure: A function failed, ended the process or took too long; in the last two cases the process is gone.
            Interrupted: A function raised KeyboardInterrupt.
        """
        return [self._reward(number, answers) for number in range(len(self.functions))]

    def _reward(self, number: int, answers: AnswerBatch) -> list[float]:
        """Call one function."""
        self.load()
        reply = self._ask((number, answers), self.timeout, self.functions[number].function)
        if isinstance(reply, RewardFailure):
            raise reply
        if isinstance(reply, int):
            raise Interrupted(reply)
        return list(reply)

    def kill(self) -> None:
        """Kill the process."""
        if self._stop is not None:
            self._stop()
        self._process = self._connection = self._stop = None

    def _ask(self, request: Any, limit: float, function: str) -> Any:
        """Send a request, and return the reply; the error names ``function`` if there is none."""
        timed_out = False
        assert self._process is not None
        assert self._connection is not None
        try:
            self._connection.send_bytes(pickle.dumps((request, limit)))
            if self._connection.poll(min(limit, _LONGEST_WAIT)):
                return pickle.loads(self._connection.recv_bytes())
            reason, timed_out = f"took longer than {limit:g} s (timeout) and was stopped", True
        except (OSError, EOFError):
            try:
                status = self._process.wait(timeout=10)
                how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
                reason = f"ended the reward process {how}"
            except subprocess.TimeoutExpired:
                reason = "closed its connection to slzo, but did not end"
        except BaseException:  # an interrupt: the next request would read the reply to this one
            self.kill()
            raise
        self.kill()
        raise RewardFailure(function, reason, timed_out=timed_out)


def _kill(process: "subprocess.Popen[bytes]", connection: "Connection[Any, Any]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    connection.close()


def serve(handle: int) -> None:
    """Serve the requests of a connection until it ends. The new process runs this.

    A message is a pickle. The first request is the list of functions, and its reply the columns that each of them requires. The
    others are the number of a function and answers for it to reward.
    """
    connection: Connection[Any, Any] = Connection(handle)
    os.set_inheritable(handle, False)  # a program that a function starts would keep it open
    loaded: list[tuple[RewardSpec, RewardFunction]] = []
    while True:
        try:
            request, limit = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        # if the parent process is gone and the function never returns, the alarm ends this process
        signal.setitimer(signal.ITIMER_REAL, 2 * min(limit, _LONGEST_WAIT) + 10)
        reply: Any = None
        try:
            if not loaded:
                loaded = [(spec, load_function(spec)) for spec in request]
                reply = [required_columns(*pair) for pair in loaded]
            else:
                number, answers = request
                spec, function = loaded[number]
                reply = call(spec, function, answers)
        except RewardFailure as failure:
            reply = failure
        except Interrupted as stop:
            reply = stop.number
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(pickle.dumps(reply))
