"""Notice when another process of a run no longer answers, on this machine or on another one."""

import threading
from collections.abc import Callable, Mapping

from torch.distributed import DistError, TCPStore

BEAT_S = 5.0
"""Seconds between two beats."""
MISSED_BEATS = 8
"""A process is lost after this number of beats in a row without news of it."""
# seconds to wait for the end of the threads; one of them may wait for a server that hangs
_PATIENCE_S = 1.0


def send_beat(store: TCPStore, rank: int) -> None:
    """Count one beat of a process in the store. All send the first one before any of them makes a :class:`Heartbeat`."""
    store.add(f"beat-{rank}", 1)


class Heartbeat:
    """Counts beats in a store that all processes share, and watches the counts of the others, in a thread.

    A process whose threads all hang, such as a stopped one or one on a machine that is gone, sends no beats. Beats are
    counted instead of seconds, so that a run that was suspended as a whole goes on.

    Args:
        store: The store; its server is in the process of rank 0.
        rank: Rank of this process.
        number: Number of processes.
        lost: Called in the thread with the rank of the first process that is lost.
        interval: Seconds between two beats.
    """

    def __init__(self, store: TCPStore, rank: int, number: int, lost: Callable[[int], None], interval: float) -> None:
        self._store, self._rank, self._lost, self._interval = store, rank, lost, interval
        self._others = [other for other in range(number) if other != rank]
        self._counts = self._read()
        self._stopped = threading.Event()
        # if the process with the server hangs, the first thread waits for it, and the second one notices
        targets = (("slzo-beat", self._beat), ("slzo-watch", self._watch))
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in targets]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send and expect no more beats. Call it when all processes have reached the same point."""
        self._stopped.set()
        for thread in self._threads:  # Python ends with SIGABRT if a thread is in a call of the store
            thread.join(_PATIENCE_S)

    def _beat(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                send_beat(self._store, self._rank)
                self._counts = self._read()
            except DistError:  # the process with the server has ended
                return

    def _read(self) -> Mapping[int, int]:
        """Return the number of beats of each other process."""
        return {other: self._store.add(f"beat-{other}", 0) for other in self._others}

    def _watch(self) -> None:
        before, missed = self._counts, dict.fromkeys(self._counts, 0)
        while not self._stopped.wait(self._interval):
            counts = self._counts
            # a process that never sent a beat may be unable to reach the store
            missed = {other: missed[other] + 1 if 0 < counts[other] == before[other] else 0 for other in counts}
            before = counts
            late = [other for other in sorted(missed) if missed[other] >= MISSED_BEATS]
            if late and not self._stopped.is_set():
                self._lost(late[0])
                return
