"""More processes for the cells of an experiment: the same command several times, on one folder of results."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slzo.utils.console import WORKER, is_worker, rank_zero_warn
from slzo.utils.errors import SlzoError


@contextmanager
def workers(number: int) -> Iterator[None]:
    """Run the command in ``number`` processes, this one included, for a ``with`` block, which does the same work itself.

    The processor's cores are divided evenly, and so are the GPUs. The block must divide its work with
    :meth:`slzo.experiments.store.CellStore.complete`, so that it does what a process leaves that ends early. At the end, or if
    the block raises, the processes are ended.

    Raises:
        SlzoError: ``number`` is not positive, or larger than the number of cores.
    """
    cores = len(os.sched_getaffinity(0))
    if not 1 <= number <= cores:
        raise SlzoError(
            f"workers {number}: each worker needs a core of its own, and there are {cores}; give 1 to {cores}"
        )
    if is_worker():
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        yield
        return
    if number == 1:
        yield
        return
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(cores // number, int(wanted) if wanted.isdecimal() and int(wanted) else cores)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = visible.split(",") if visible else [str(card) for card in range(torch.cuda.device_count())]
    started = []
    for worker in range(1, number):
        variables = {WORKER: str(worker), "OMP_NUM_THREADS": str(threads)}
        if len(cards) > 1:
            variables["CUDA_VISIBLE_DEVICES"] = cards[worker % len(cards)]
        command = [sys.executable, *sys.orig_argv[1:]]
        started.append(subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    finished = False
    try:
        yield
        finished = True
    finally:
        torch.set_num_threads(before)
        for worker, process in enumerate(started, start=1):
            if finished and process.poll() not in (None, 0):
                rank_zero_warn(f"worker {worker} ended early with status {process.returncode}; the others did its work")
            process.terminate()
        for process in started:
            process.wait()


def _end_with(parent: int) -> None:
    """End this worker when the process that started it is gone, which alone reports the results."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
