"""Says when Lightning validates, where a run is written, and which callbacks it has, from its trainer's public attributes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)

from slzo.utils.errors import SlzoError

_Kind = TypeVar("_Kind", bound=Callback)
_REFUSED: Mapping[type[Callback], str] = MappingProxyType(
    {
        WeightAveraging: "leave it out; the best checkpoint is kept",
        StochasticWeightAveraging: "leave it out; the best checkpoint is kept",
        LearningRateFinder: "leave model.optimizer.lr at auto, or compare rates with slzo sweep --lrs",
        BatchSizeFinder: "leave it out; slzo plan estimates the memory",
        GradientAccumulationScheduler: "raise data.batch_size; data.tokens_per_pass runs a large batch in parts",
    }
)


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


def check_precision(precision: object) -> None:
    """Refuse mixed and half precision of Lightning.

    Raises:
        SlzoError: ``trainer.precision`` is not full precision.
    """
    if precision not in (None, 32, "32", "32-true"):
        raise SlzoError(
            f"trainer.precision {precision!r}: the masters of the tuned layer stay in float32; leave it at 32-true; for a model "
            "in half precision set model.dtype to bfloat16 or float16"
        )


def check_supported(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks of Lightning that have no effect, or a wrong one, with slzo's steps.

    Raises:
        SlzoError: There is such a callback.
    """
    for callback in callbacks:
        if advice := next((text for kind, text in _REFUSED.items() if isinstance(callback, kind)), None):
            name = type(callback).__name__
            raise SlzoError(f"trainer.callbacks {name}: does not work with slzo's steps; {advice}")


def check_overfit_batches(overfit_batches: float | None) -> None:
    """Refuse ``trainer.overfit_batches``: the batch of a step depends on its number.

    Raises:
        SlzoError: It is set.
    """
    if overfit_batches:
        raise SlzoError(
            f"trainer.overfit_batches {overfit_batches}: each step draws other rows; leave it out, and set data.num_train to a "
            "few rows to train on the same ones"
        )


def check_interval(trainer: Trainer, num_batches: int) -> None:
    """Refuse an interval between validations that is longer than an epoch, if validations are counted per epoch.

    Raises:
        SlzoError: The interval is longer than ``num_batches``.
    """
    every = interval_of(trainer)
    if isinstance(every, int) and trainer.check_val_every_n_epoch is not None and every > num_batches:
        raise SlzoError(
            f"trainer.val_check_interval {every}: an epoch has {num_batches} batches; give at most {num_batches}, or set "
            "trainer.check_val_every_n_epoch to null to count steps across epochs"
        )
