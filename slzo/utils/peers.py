"""Notice when another process of a run has ended."""

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

LAUNCHER = "SLZO_LAUNCHER"
"""Environment variable with the ID of the process that started the others on a machine."""

_TICK_MS, _LAUNCHER_TICK_S = 500, 0.05
# seconds in which this process can report a common cause itself
_GRACE_S = 2.0


class Peer(NamedTuple):
    """A process of a run.

    Attributes:
        rank: Its rank.
        place: Machine and process namespace in which ``pid`` counts; empty where processes cannot be watched.
        pid: Process ID.
    """

    rank: int
    place: str
    pid: int

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """Return this process."""
        try:
            os.close(os.pidfd_open(os.getpid()))
            place = f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
        except (AttributeError, OSError):  # not Linux, or not allowed
            place = ""
        return cls(rank, place, os.getpid())


class PeerWatch:
    """Watches the other processes of a run on this machine, in a thread. Without Linux it does nothing.

    Args:
        peers: All processes of the run.
        own: This process.
        ended: Called in the thread with the first process that has ended, and whether this process is the one to report it.
    """

    def __init__(self, peers: Sequence[Peer], own: Peer, ended: Callable[[Peer, bool], None]) -> None:
        self._others = [peer for peer in peers if own.place and peer.place == own.place and peer != own]
        self._own, self._ended = own, ended
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slzo-peers", daemon=True)
        self._thread.start()

    def stop(self, patience: float = 0.0) -> None:
        """End the watch, after a time in seconds in which it may still find that a process has ended."""
        self._thread.join(patience)
        self._stopped.set()

    def _run(self) -> None:
        poller, handles = select.poll(), {}
        gone = []
        for peer in self._others:
            try:
                handles[handle := os.pidfd_open(peer.pid)] = peer
            except ProcessLookupError:
                gone.append(peer)
            else:
                poller.register(handle, select.POLLIN)  # readable when the process has ended
        while handles and not gone and not self._stopped.is_set():
            gone = [handles[handle] for handle, _ in poller.poll(_TICK_MS)]
        for handle in handles:
            os.close(handle)
        # without a signal it may have ended for a reason that ends this process too
        if gone and not self._stopped.is_set() and (_was_killed(gone[0].pid) or not self._stopped.wait(_GRACE_S)):
            alive = [peer.rank for peer in self._others if peer not in gone]
            self._ended(gone[0], self._own.rank < min(alive, default=self._own.rank + 1))


def launcher_ends(seconds: float) -> bool:
    """Whether another process of the run started this one and ends within ``seconds``.

    If it does so after an error of this process, it had an error of its own, and has printed it.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0" or LAUNCHER not in os.environ:
        return False
    launcher, end = int(os.environ[LAUNCHER]), time.monotonic() + seconds
    while os.getppid() == launcher:
        if time.monotonic() > end:
            return False
        time.sleep(_LAUNCHER_TICK_S)
    return True


def end_process(status: int, text: str) -> None:
    """Write a text to standard error and end this process at once, from any thread: the main one may wait for another process."""
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(status)


def _was_killed(pid: int) -> bool:
    """Whether a signal has ended a child of this process; its status can still be collected."""
    try:
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:  # not a child
        return False
    return status is not None and status.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
