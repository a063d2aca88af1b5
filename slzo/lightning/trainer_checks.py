"""Refuses options and callbacks that do not work with slzo's steps, of any trainer."""

from collections.abc import Callable, Mapping, Sequence

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from slzo.lightning.trainer_state import interval_of, steps_per_epoch
from slzo.task_data import TaskData
from slzo.utils.errors import SlzoError

_REFUSED: Mapping[type[Callback], str] = {
    WeightAveraging: "leave it out; the best checkpoint is kept",
    StochasticWeightAveraging: "leave it out; the best checkpoint is kept",
    LearningRateFinder: "leave model.optimizer.lr at auto, or compare rates with slzo sweep --lrs",
    BatchSizeFinder: "leave it out; slzo plan estimates the memory",
    GradientAccumulationScheduler: "raise data.batch_size; data.tokens_per_pass runs a large batch in parts",
    BaseFinetuning: "leave it out; model.layer and model.scope say what is tuned",
    ModelPruning: "leave it out; it prunes all weights, and slzo keeps the tuned ones only",
}


def check_torch(fits: bool) -> None:
    """Check the modes of torch that hold for the whole process or for the block around a call.

    Raises:
        SlzoError: Scores would be rounded to another type than float32, or, if ``fits``, nothing could be differentiated or
            changed later.
    """
    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        raise SlzoError(
            f"torch.set_default_dtype: is {dtype}, in which losses and scores would be computed; set it back to torch.float32, "
            "and give the type of the model as model.dtype"
        )
    kinds = {"cpu", getattr(torch.accelerator.current_accelerator(), "type", "cpu")}
    if any(torch.is_autocast_enabled(kind) for kind in kinds):
        raise SlzoError(
            "torch.autocast: is on, so losses and scores would be rounded; call the trainer outside of that block, and give the "
            "type of the model as model.dtype"
        )
    if fits and torch.is_inference_mode_enabled():
        raise SlzoError(
            "fit: torch.inference_mode is on, and nothing can be trained in it; call fit outside of that block"
        )


def check_trainer(trainer: Trainer, data: TaskData) -> None:
    """Check the options and callbacks of a trainer before a fit. Lightning refuses some only after the model is profiled.

    Raises:
        SlzoError: One of them does not work with slzo's steps.
    """
    check_precision(trainer.precision)
    check_overfit_batches(getattr(trainer, "overfit_batches", None))
    check_supported(trainer.callbacks)  # type: ignore[attr-defined]
    _check_limit_batches("train", trainer.limit_train_batches, lambda: len(data.sampler()))
    _check_limit_batches("val", trainer.limit_val_batches, lambda: len(data.eval_plan("dev").batches))
    check_interval(trainer, steps_per_epoch(trainer, data))


def _check_limit_batches(stage: str, share: float, count: Callable[[], int]) -> None:
    """Check that a fraction given as ``trainer.limit_STAGE_batches`` keeps at least one of the ``count()`` batches.

    Raises:
        SlzoError: It does not.
    """
    if isinstance(share, float) and 0 < share < 1 and 0 < (batches := count()) < 1 / share:
        raise SlzoError(
            f"trainer.limit_{stage}_batches {share}: is less than one of the {batches} batches; give at least {1 / batches:.3g}, "
            "or a number of batches"
        )


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
            f"trainer.val_check_interval {every}: must be at most {num_batches}, the number of batches in an epoch; or set "
            "trainer.check_val_every_n_epoch to null to count steps across epochs"
        )
