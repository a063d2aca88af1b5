"""Says when Lightning validates, where a run is written, and which callbacks it has, from its trainer's public attributes."""

import math
from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Callback, Trainer

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


def is_last_step(trainer: Trainer) -> bool:
    """Whether training ends after the current step, as far as this is known in advance."""
    may_stop = trainer.global_step >= (trainer.min_steps or 0) and trainer.current_epoch >= (trainer.min_epochs or 0)
    if (trainer.should_stop and may_stop) or trainer.global_step == trainer.max_steps:
        return True
    epochs = trainer.max_epochs
    return epochs is not None and trainer.current_epoch + 1 == epochs and trainer.is_last_batch
