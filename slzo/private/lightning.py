"""Parts of Lightning and of ``torch.compile`` that have no public names, and counts in a checkpoint whose form is not public."""

import atexit
from typing import Any

from lightning.fabric.utilities.distributed import _destroy_dist_connection


def is_compiled(module: object) -> bool:
    """Return whether a module comes from ``torch.compile``, or Lightning has replaced its steps by compiled ones."""
    # importing the class takes a second
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiler_ctx", None) is not None


def copies_process(launcher: object) -> bool:
    """Return whether the launcher of a strategy forks or spawns copies of this process."""
    return any(kind.__name__ == "_MultiProcessingLauncher" for kind in type(launcher).__mro__)


def saves_by_time(callback: object) -> bool:
    """Return whether a ``ModelCheckpoint`` has a ``train_time_interval``."""
    return getattr(callback, "_train_time_interval", None) is not None


def keep_process_group_at_exit() -> None:
    """Let this process end without destroying the process group, which waits for the other processes.

    With NCCL, Lightning destroys it when the interpreter ends.
    """
    atexit.unregister(_destroy_dist_connection)


def count_epoch_as_started(checkpoint: dict[str, Any]) -> None:
    """Count the current epoch of a checkpoint as started.

    After a restart from an epoch's last step, Lightning does not count the epoch, and the next restart would miscount.
    """
    for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        counts["ready"] = counts["started"] = counts["processed"] + 1


def count_step_as_open(checkpoint: dict[str, Any]) -> None:
    """Count the current step of a checkpoint as not completed: in a longer run no validation follows it."""
    for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(counts, dict):
            counts["completed"] = counts["processed"] - 1


def drop_ready_step(checkpoint: dict[str, Any]) -> None:
    """Do not count a step that is only ready, as in ``on_train_batch_start``: a restart takes it, and would count it twice."""
    for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(counts, dict) and counts["started"] == counts["processed"]:
            counts["ready"] = counts["started"]
