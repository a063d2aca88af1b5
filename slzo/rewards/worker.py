"""Main loop of the process that runs reward functions: it reads requests from a connection and writes replies to it.

A message is a pickle. The first request is the list of functions, and its reply the columns that each of them requires. The
others are the number of a function and answers for it to reward.
"""

import os
import pickle
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from slzo.rewards.calls import RewardCall, RewardFailure, call, load_function, required_columns
from slzo.rewards.registry import RewardFunction
from slzo.utils.errors import Interrupted


def main(handle: int) -> None:
    """Serve the requests of a connection until it ends."""
    connection: Connection[Any, Any] = Connection(handle)
    os.set_inheritable(handle, False)  # a program that a function starts would keep it open
    functions: list[RewardFunction] = []
    wanted: Sequence[RewardCall] = ()
    while True:
        try:
            request, limit = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        # if the parent process is gone and the function never returns, the alarm ends this process
        signal.setitimer(signal.ITIMER_REAL, 2 * limit + 10)
        reply: Any = None
        try:
            if isinstance(request, list):
                wanted, functions = request, [load_function(one) for one in request]
                reply = [required_columns(*pair) for pair in zip(wanted, functions, strict=True)]
            else:
                number, answers = request
                reply = call(wanted[number], functions[number], answers)
        except RewardFailure as failure:
            reply = failure
        except Interrupted as stop:
            reply = stop.number
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(pickle.dumps(reply))
