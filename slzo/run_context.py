"""Where and how long a trainer trains."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lightning.pytorch import Trainer

from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.callbacks.time_limit import TimeLimit
from slzo.checkpoints.checkpoint import Checkpoint
from slzo.data.batch import EvalBatch, Row
from slzo.schedule import callback_of, is_quick
from slzo.strategy import shard_group_of
from slzo.task_rows import TaskRows
from slzo.training.run import RunContext
from slzo.utils.process_group import gather_from_processes
from slzo.zo.time_plan import Passes, TimeBudget


def run_context(
    trainer: Trainer, rows: TaskRows, *, folder: Path | None = None, checkpoint: Checkpoint | None = None
) -> RunContext:
    """Describe the training that ``trainer`` runs with ``rows``, which are set up for ``fit``."""
    profiler = callback_of(trainer, OutlierProfiler)
    return RunContext(
        device=trainer.strategy.root_device,
        max_steps=trainer.max_steps,
        planned_steps=planned_steps(trainer, rows),
        folder=folder,
        checkpoint=checkpoint,
        profiler=None if profiler is None else profiler.options,
        steps_before=0 if checkpoint is not None else trainer.global_step,
        quick=is_quick(trainer),
        time=_time_budget(trainer, rows),
        shard_group=shard_group_of(trainer),
    )


def dev_batches(trainer: Trainer, rows: TaskRows) -> Iterator[EvalBatch]:
    """Return the batches of dev rows that a validation scores in this process, with ``trainer.limit_val_batches``."""
    return islice(rows.eval_batches("dev"), len(_scored_rows(trainer, rows)))


def num_dev_rows(trainer: Trainer, rows: TaskRows) -> int:
    """Return how many dev rows a validation scores, with ``trainer.limit_val_batches``. A collective call."""
    return sum(gather_from_processes([sum(map(len, _scored_rows(trainer, rows)))]))


def _scored_rows(trainer: Trainer, rows: TaskRows) -> list[list[Row]]:
    """Return the dev rows that a validation scores in this process, batch by batch."""
    batches, limit = rows.eval_plan("dev").batches, trainer.limit_val_batches
    return batches[: limit if isinstance(limit, int) else int(len(batches) * limit)]


def _time_budget(trainer: Trainer, rows: TaskRows) -> TimeBudget | None:
    """Return the time of a run and its other limits; ``None`` if the time is not limited."""
    limit = callback_of(trainer, TimeLimit)
    if limit is None or is_quick(trainer):
        return None
    max_steps, interval = limit.given(trainer)
    by_step = trainer.check_val_every_n_epoch is None
    every = interval if isinstance(interval, int) else max(1.0, interval * steps_per_epoch(trainer, rows))
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    passes = [each.passes for each in callbacks if isinstance(getattr(each, "passes", None), Passes)]
    return TimeBudget(
        limit.seconds,
        limit.ends,
        max_steps=_step_limit(trainer, rows, max_steps),
        done=trainer.global_step,
        every=every * (trainer.check_val_every_n_epoch or 1),
        every_seconds=limit.every_seconds,
        sets_interval=by_step,
        dev_batches=len(_scored_rows(trainer, rows)),
        passes=sum(passes, Passes()),
    )


def planned_steps(trainer: Trainer, rows: TaskRows) -> int:
    """Return the expected number of training steps; the steps of one epoch if no limit is set."""
    limit = _step_limit(trainer, rows, trainer.max_steps)
    return limit if limit > 0 else steps_per_epoch(trainer, rows)


def _step_limit(trainer: Trainer, rows: TaskRows, max_steps: int) -> int:
    """Return the number of steps that ``max_steps`` and ``trainer.max_epochs`` allow; -1 for no limit."""
    epochs = trainer.max_epochs or -1
    limits = [max_steps] if max_steps > 0 else []
    if epochs > 0:
        limits.append(epochs * steps_per_epoch(trainer, rows))
    return min(limits, default=-1)


def steps_per_epoch(trainer: Trainer, rows: TaskRows) -> int:
    """Return the steps of an epoch, with ``trainer.limit_train_batches``."""
    limit, batches = trainer.limit_train_batches, len(rows.sampler())
    return min(batches, limit if isinstance(limit, int) else int(batches * limit))
