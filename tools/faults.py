"""Run a function in a forked process, and send it a signal at a time, or at one of its writes, renames and deletes."""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, NamedTuple

from slzo.zo.stepper import Stepper

EVENTS, STEPS = range(2)
"""Places of the counters: of writes, renames and deletes, and of steps that ran the model."""

PATIENCE_S = 300.0
"""A process that takes longer hangs."""

_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Fault(NamedTuple):
    """A signal and the time at which it is sent.

    Attributes:
        number: Number of the signal.
        seconds: Time in seconds after the start; ``None`` for an event.
        event: Number of the write, rename or delete.
    """

    number: signal.Signals
    seconds: float | None
    event: int = 0


class Child(NamedTuple):
    """How a child process ended.

    Attributes:
        status: Exit status, negative for a signal; ``None`` if it hung.
        seconds: Duration in seconds.
        hit: Whether the fault occurred before it ended.
    """

    status: int | None
    seconds: float
    hit: bool


Counters = ctypes.Array[ctypes.c_longlong]


def new_counters() -> Counters:
    """Return counters of children in shared memory."""
    return RawArray("q", 2)


def run_child(call: Callable[[], int], folder: Path, counters: Counters, fault: Fault | None = None) -> Child:
    """Call a function in a forked process, in a folder, with a fault."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(call, folder, counters, fault)
    sent = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        passed = time.monotonic() - started
        if done:
            code = os.waitstatus_to_exitcode(status)
            hit = fault is not None and (sent or code == -fault.number or code == 128 + fault.number)
            return Child(code, passed, hit)
        if fault is not None and fault.seconds is not None and not sent and passed >= fault.seconds:
            os.kill(pid, fault.number)
            sent = True
        if passed > PATIENCE_S:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Child(None, passed, True)
        time.sleep(0.005)


def _child(call: Callable[[], int], folder: Path, counters: Counters, fault: Fault | None) -> None:
    """Run in the forked process; never returns."""
    status = 1
    try:
        os.chdir(folder)
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        original = Stepper.loss

        def loss(stepper: Stepper, *args: Any) -> Any:
            counters[STEPS] += 1
            return original(stepper, *args)

        setattr(Stepper, "loss", loss)  # noqa: B010  mypy refuses an assignment
        sys.addaudithook(lambda event, args: _at_event(event, args, str(folder), counters, fault))
        status = call()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _at_event(event: str, args: tuple[Any, ...], folder: str, counters: Counters, fault: Fault | None) -> None:
    if event not in _EVENTS or not isinstance(args[0], str | os.PathLike):
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITES):
        return
    if not os.path.abspath(args[0]).startswith(folder):  # noqa: PTH100
        return
    counters[EVENTS] += 1
    if fault is not None and fault.seconds is None and counters[EVENTS] == fault.event:
        os.kill(os.getpid(), fault.number)
