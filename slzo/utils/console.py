"""Plain lines on standard output, from the first process of a run only."""

import os
import sys

import torch.distributed

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Set by launchers before there is a process group."""


def is_first_process() -> bool:
    """Whether this process has rank 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def say(text: str = "") -> None:
    """Write one or more lines."""
    if is_first_process():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def warn(text: str) -> None:
    """Write a warning to standard error."""
    if is_first_process():
        sys.stderr.write(f"slzo: warning: {text}\n")
        sys.stderr.flush()
