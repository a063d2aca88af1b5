"""Where and how long a trainer trains."""

from pathlib import Path

from lightning.pytorch import Trainer

from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.callbacks.schedule import is_quick
from slzo.checkpoints.checkpoint import Checkpoint
from slzo.run import RunContext
from slzo.task_rows import TaskRows


def run_context(
    trainer: Trainer, rows: TaskRows, *, folder: Path | None = None, checkpoint: Checkpoint | None = None
) -> RunContext:
    """Describe the training that ``trainer`` runs with ``rows``.

    Args:
        trainer: The trainer.
        rows: Rows of the task, set up for ``fit``.
        folder: Folder of the run; ``None`` if no checkpoints are written.
        checkpoint: Checkpoint to continue; ``None`` for a new training.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return RunContext(
        device=trainer.strategy.root_device,
        max_steps=trainer.max_steps,
        planned_steps=planned_steps(trainer, rows),
        folder=folder,
        checkpoint=checkpoint,
        profiler=next((each.options for each in callbacks if isinstance(each, OutlierProfiler)), None),
        quick=is_quick(trainer),
    )


def planned_steps(trainer: Trainer, rows: TaskRows) -> int:
    """Return the expected number of training steps; the steps of one epoch if no limit is set."""
    limit, batches = trainer.limit_train_batches, rows.steps_per_epoch
    if limit is not None:
        batches = min(batches, limit if isinstance(limit, int) else int(batches * limit))
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if epochs is not None or not limits:
        limits.append(batches * (epochs or 1))
    return min(limits)
