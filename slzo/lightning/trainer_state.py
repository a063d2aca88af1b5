"""What a Lightning trainer says of its run: callbacks, folder, validations and limits."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Callback, Trainer

from slzo.data.batch import EvalBatch, Row
from slzo.task_data import TaskData
from slzo.utils.process_group import gather_from_processes

_Kind = TypeVar("_Kind", bound=Callback)


def callback_of(trainer: Trainer, kind: type[_Kind]) -> _Kind | None:
    """Return the callback of a class; ``None`` if the trainer has none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, kind)), None)


def is_quick(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, in which nothing extra is measured or written."""
    return bool(getattr(trainer, "fast_dev_run", False))


def folder_of(trainer: Trainer) -> Path | None:
    """Return the folder of the run; ``None`` if nothing is written. A collective call."""
    log_dir = trainer.log_dir
    return None if log_dir is None or is_quick(trainer) else Path(log_dir)


def validation_due(trainer: Trainer) -> bool:
    """Whether a scheduled validation follows the current step of a fit.

    An extra validation at the end of a run is not scheduled. Callbacks that change a run ignore it, so that a continued run
    equals one that was longer from the start. If ``val_check_interval`` is a wall-clock time, the result is always ``False``.
    """
    every, every_epoch = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.enable_validation or every is None:
        return False
    if every_epoch is not None and (trainer.current_epoch + 1) % every_epoch != 0:
        return False
    if every == math.inf:
        return trainer.is_last_batch
    done = trainer.fit_loop.epoch_loop.total_batch_idx if every_epoch is None else trainer.fit_loop.batch_idx
    return (done + 1) % int(every) == 0


def interval_of(trainer: Trainer) -> int | float | None:
    """Return ``val_check_interval`` of a trainer; ``None`` if it is a wall-clock time, for which Lightning sets none."""
    return getattr(trainer, "val_check_interval", None)


def is_last_step(trainer: Trainer, done: int | None = None) -> bool:
    """Whether training ends after the current step, as far as this is known in advance.

    ``done`` is the number of steps with the current one; by default that of the trainer, which counts it when it is done.
    """
    done = trainer.global_step if done is None else done
    may_stop = done >= (trainer.min_steps or 0) and trainer.current_epoch >= (trainer.min_epochs or 0)
    if (trainer.should_stop and may_stop) or done == trainer.max_steps:
        return True
    epochs = trainer.max_epochs
    return epochs is not None and trainer.current_epoch + 1 == epochs and trainer.is_last_batch


def dev_batches(trainer: Trainer, data: TaskData) -> Iterator[EvalBatch]:
    """Return the batches of dev rows that a validation scores in this process, with ``trainer.limit_val_batches``."""
    return islice(data.eval_batches("dev"), len(scored_rows(trainer, data)))


def num_dev_rows(trainer: Trainer, data: TaskData) -> int:
    """Return how many dev rows a validation scores, with ``trainer.limit_val_batches``. A collective call."""
    return sum(gather_from_processes([sum(map(len, scored_rows(trainer, data)))]))


def scored_rows(trainer: Trainer, data: TaskData) -> list[list[Row]]:
    """Return the dev rows that a validation scores in this process, batch by batch."""
    batches, limit = data.eval_plan("dev").batches, trainer.limit_val_batches
    return batches[: limit if isinstance(limit, int) else int(len(batches) * limit)]


def planned_steps(trainer: Trainer, data: TaskData) -> int:
    """Return the expected number of training steps; the steps of one epoch if no limit is set."""
    limit = step_limit(trainer, data, trainer.max_steps)
    return limit if limit > 0 else steps_per_epoch(trainer, data)


def step_limit(trainer: Trainer, data: TaskData, max_steps: int) -> int:
    """Return the number of steps that ``max_steps`` and ``trainer.max_epochs`` allow; -1 for no limit."""
    epochs = trainer.max_epochs or -1
    limits = [max_steps] if max_steps > 0 else []
    if epochs > 0:
        limits.append(epochs * steps_per_epoch(trainer, data))
    return min(limits, default=-1)


def steps_per_epoch(trainer: Trainer, data: TaskData) -> int:
    """Return the steps of an epoch, with ``trainer.limit_train_batches``."""
    limit, batches = trainer.limit_train_batches, len(data.sampler())
    return min(batches, limit if isinstance(limit, int) else int(batches * limit))
