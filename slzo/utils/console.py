"""Write plain lines to the console."""

import os
import sys
from contextlib import suppress

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Variables that launchers set before there is a process group."""

WORKER = "SLZO_WORKER"
"""Environment variable of processes that work on cells for another one, see :mod:`slzo.experiments.workers`."""


def is_worker() -> bool:
    """Whether this process works on cells for another one, which writes and prints the results."""
    return WORKER in os.environ


def is_first_process() -> bool:
    """Whether this process has rank 0."""
    if "torch" in sys.modules:  # without torch there is no process group
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank() == 0
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def rank_zero_print(text: str = "", end: str = "\n") -> None:
    """Write text and ``end`` to standard output, from the first process of a run only.

    Output to a closed pipe, as in ``slzo fit ... | head``, is dropped. Characters that the
    output's encoding lacks are replaced.
    """
    stream = sys.stdout
    if is_first_process() and stream is not None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        with suppress(BrokenPipeError):
            stream.write(f"{text}{end}".encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()


def rank_zero_info(line: str) -> None:
    """Write one line to standard error, from the first process of a run only."""
    if is_first_process():
        print_status(line)


def rank_zero_warn(text: str) -> None:
    """Write a warning to standard error, from the first process of a run only."""
    rank_zero_info(f"warning: {text}")


def print_status(line: str) -> None:
    """Write one line to standard error, from every process."""
    sys.stderr.write(f"slzo: {line}\n")
    sys.stderr.flush()
