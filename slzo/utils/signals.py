"""Hold signals during short pieces of work."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from slzo.utils.slurm import PREEMPTION, job_id


def termination_signals() -> tuple[int, ...]:
    """Return the signals besides Ctrl-C that end a run: SIGTERM, and in a SLURM job that of a preemption."""
    return (signal.SIGTERM,) if job_id() is None else (signal.SIGTERM, PREEMPTION)


def unignored_signals() -> list[int]:
    """Return the signals that end a run and are not ignored, as Ctrl-C is by a job in the background of a shell."""
    return [each for each in (signal.SIGINT, *termination_signals()) if signal.getsignal(each) != signal.SIG_IGN]


@contextmanager
def handle_signals(numbers: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle signals in a block; outside of the main thread, which alone can, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def interrupts_restored() -> Iterator[None]:
    """Restore the handler of Ctrl-C after a block, in which Lightning may have ignored it for the rest of the process."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


@contextmanager
def signals_held() -> Iterator[None]:
    """Delay Ctrl-C, SIGTERM and the preemption signal of SLURM until the context ends.

    Otherwise C code that calls back to Python would convert what a signal handler raises to its own errors.
    """
    held: list[int] = []
    try:
        with handle_signals(unignored_signals(), lambda number, _: held.append(number)):
            yield
    finally:
        if held:
            os.kill(os.getpid(), held[0])
