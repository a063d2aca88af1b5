"""Hold signals during short pieces of work."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from slzo.utils.slurm import PREEMPTION, job_id


def termination_signals() -> tuple[int, ...]:
    """Return the signals besides Ctrl-C that end a run: SIGTERM, and in a SLURM job that of a preemption."""
    return (signal.SIGTERM,) if job_id() is None else (signal.SIGTERM, PREEMPTION)


@contextmanager
def signals_held() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and the preemption signal of SLURM until the context ends.

    Otherwise C code that calls back to Python would convert what a signal handler raises to its own errors.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    numbers = (signal.SIGINT, *termination_signals())
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            os.kill(os.getpid(), held[0])
