"""When Lightning validates, from the public attributes of its trainer."""

import math

from lightning.pytorch import Trainer

from slzo.utils.errors import SlzoError


def validation_due(trainer: Trainer) -> bool:
    """Whether the schedule has a validation after the present step of a fit; a longer run would do it at this step too.

    What changes a run looks at these validations alone, not at the one that only the end of a run brings: a run that is
    continued must not differ from one that was longer from the beginning. With ``val_check_interval`` as a wall-clock time
    there is no such step, and it is ``False``.
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


def is_last_step(trainer: Trainer) -> bool:
    """Whether training ends after the present step, as far as that is known before it ends."""
    if trainer.should_stop or trainer.global_step == trainer.max_steps:
        return True
    epochs = trainer.max_epochs
    return epochs is not None and trainer.current_epoch + 1 == epochs and trainer.is_last_batch


def check_interval(trainer: Trainer, num_batches: int) -> None:
    """Refuse an interval between validations that is longer than an epoch of so many batches, where epochs are counted.

    Raises:
        SlzoError: It is.
    """
    every = trainer.val_check_interval
    if isinstance(every, int) and trainer.check_val_every_n_epoch is not None and every > num_batches:
        raise SlzoError(
            f"trainer.val_check_interval {every}: an epoch has {num_batches} batches; give at most so many, or set "
            "trainer.check_val_every_n_epoch to null to count steps over epochs"
        )
