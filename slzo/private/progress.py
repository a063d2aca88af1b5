"""Lightning's counts of epochs and batches in a checkpoint, whose form is not public."""

from typing import Any


def count_epoch_as_started(checkpoint: dict[str, Any]) -> None:
    """Count the current epoch as started.

    After a restart from an epoch's last step, Lightning does not count the epoch, and the next restart would miscount.
    """
    for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        counts["ready"] = counts["started"] = counts["processed"] + 1


def count_step_as_open(checkpoint: dict[str, Any]) -> None:
    """Count the current step as not completed: in a longer run no validation follows it."""
    for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(counts, dict):
            counts["completed"] = counts["processed"] - 1
