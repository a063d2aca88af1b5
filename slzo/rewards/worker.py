"""Main loop of the process that runs reward functions: it reads requests from standard input and writes replies to a pipe.

A frame is a length in 8 bytes and a pickle. The first request is the list of functions; the others are answers to reward.
"""

import os
import pickle
import signal
import struct
import sys
from collections.abc import Sequence
from typing import IO, Any

from slzo.rewards.calls import RewardCall, RewardFailure, call, load_function
from slzo.rewards.registry import RewardFunction
from slzo.utils.errors import Interrupted

LENGTH = struct.Struct("<Q")


def write_frame(file: IO[bytes], content: Any) -> None:
    """Write one frame and flush."""
    data = pickle.dumps(content)
    file.write(LENGTH.pack(len(data)) + data)
    file.flush()


def read_frame(file: IO[bytes]) -> Any:
    """Read one frame; raise EOFError at the end of the file."""
    length = LENGTH.unpack(_read(file, LENGTH.size))[0]
    return pickle.loads(_read(file, length))


def _read(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Serve requests until the input ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # output of a function, or of a program that it starts, goes to standard error; it has no input
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    functions: list[RewardFunction] = []
    wanted: Sequence[RewardCall] = ()
    while True:
        try:
            request, limit = read_frame(requests)
        except EOFError:
            return
        # if the parent process is gone and the function never returns, the alarm ends this process
        signal.setitimer(signal.ITIMER_REAL, 2 * limit + 10)
        if isinstance(request, list):
            wanted, functions = request, []
            reply: Any = _load(wanted, functions)
        else:
            try:
                reply = [call(one, function, request) for one, function in zip(wanted, functions, strict=True)]
            except RewardFailure as failure:
                reply = (failure.function, failure.reason, failure.place)
            except Interrupted as stop:
                reply = stop.number
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(replies, reply)


def _load(wanted: Sequence[RewardCall], functions: list[RewardFunction]) -> tuple[str, str] | None:
    for one in wanted:
        try:
            functions.append(load_function(one))
        except LookupError as error:
            return one.function, str(error)
    return None
