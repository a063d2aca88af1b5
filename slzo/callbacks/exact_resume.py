"""A resumed run goes on in Lightning's counters where an uninterrupted one would be."""

import math
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.progress import _Progress
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.errors import SlzoError


class ExactResume(Callback):
    """Sets Lightning's counters from the number of steps, and has a validation that was not finished done first.

    Lightning saves its counters wherever a run stops: in a step one of them has moved already, and validations and logged steps
    are shifted for good; a validation that was cut off counts as done. The number of steps is always right, every batch is a
    step, and the last validation is noted here: the counters follow from these.
    """

    def __init__(self) -> None:
        self._validated = 0  # of this run, or told by the checkpoint
        self._told = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the counters of a resumed run."""
        if trainer.ckpt_path is not None:
            # a checkpoint of a former version does not say; most were saved after a validation
            _align(trainer, self._validated if self._told else trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation of this step is done; checkpoint callbacks come after this one."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = trainer.global_step

    @property
    def told(self) -> bool:
        """Whether a checkpoint has said which validation was the last one."""
        return self._told

    @property
    def validated(self) -> int:
        """The step of the last whole validation."""
        return self._validated

    def state_dict(self) -> dict[str, Any]:
        """The step of the last whole validation."""
        return {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it from a checkpoint."""
        self._validated, self._told = state_dict["validated"], True


def is_of_interval(trainer: Trainer) -> bool:
    """Whether a training's validation is one that a longer run would do at this step too.

    What changes a run looks at these alone: one that is continued must not differ from one that was longer from the beginning.
    """
    return trainer.state.fn == "fit" and not trainer.sanity_checking and not getattr(trainer.fit_loop, "at_end", False)


class FinishingFitLoop(_FitLoop):
    """Lightning's loop; a resumed run without steps left still does the validation that it owes, and ends as others do.

    Attributes:
        at_end: Whether the validation that goes on is that of the last step alone, which a longer run would not do.
    """

    at_end = False

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self.epoch_loop.val_loop.restarted_mid_evaluation and super().done

    def setup_data(self) -> None:
        """Fetch the rows; options that do not go with their number are told."""
        try:
            super().setup_data()
        except (ValueError, MisconfigurationException) as error:
            raise SlzoError(f"trainer: {' '.join(str(error).split())}") from error

    def on_run_end(self) -> None:
        """Validate the last step, which may be the best one, and end."""
        trainer = self.trainer
        known = next((c for c in trainer.callbacks if isinstance(c, ExactResume)), None)  # type: ignore[attr-defined]
        done = self._begun_at if known is None or not known.told else 0
        done = done if known is None else max(done, known.validated)
        wanted = trainer.enable_validation and not trainer.interrupted
        if wanted and trainer.global_step > done:
            if trainer.global_step == self._begun_at and _place(trainer, trainer.global_step)[1] > 0:
                # as where max_steps has just cut the epoch off
                self.epoch_progress.increment_processed()
                self.epoch_progress.increment_completed()
            self.epoch_loop._batches_that_stepped -= 1  # loggers get the step that others of the same step have
            trainer.validating = self.at_end = True
            self.epoch_loop.val_loop.run()
            self.at_end = False
            trainer.training = True
            self.epoch_loop._batches_that_stepped += 1
        super().on_run_end()

    def on_run_start(self) -> None:
        """Note where the run begins: a resumed one without steps left changes nothing, if it is not known to owe a validation."""
        self._begun_at = self.trainer.global_step
        super().on_run_start()

    @property
    def skip(self) -> bool:
        """Whether there is nothing to train on."""
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0


def _align(trainer: Trainer, validated: int) -> None:
    """Set every counter from the steps that are done and the step of the last validation."""
    loop, step = trainer.fit_loop, trainer.global_step
    epoch_loop, val_loop = loop.epoch_loop, loop.epoch_loop.val_loop
    due = _validation_due(trainer, step)
    owed = due and validated != step
    # a validation belongs to the epoch that it ends
    epoch, batch = _place(trainer, step - owed)
    batch += owed
    begun = epoch + (batch > 0)
    _set(epoch_loop.batch_progress, step, batch)
    epoch_loop.batch_progress.is_last_batch = owed and _place(trainer, step)[1] == 0
    _set(loop.epoch_progress, epoch, epoch, started=begun)
    # as if its first batch had begun, for Lightning to begin the validation again
    _set(val_loop.batch_progress, 0, 0, started=int(owed))
    loop.restarting = True
    epoch_loop.restarting = batch > 0
    loop.update_restart_stage()
    # Lightning counts one more where it finds that a validation is due, whether it does it or not
    epoch_loop._batches_that_stepped = step - (due and batch > 0)


def _set(progress: _Progress, total: int, current: int, started: int | None = None) -> None:
    """Set both trackers of a progress to what is done, ``started`` to what has begun."""
    for tracker, done in ((progress.total, total), (progress.current, current)):
        tracker.ready = tracker.started = done if started is None else started  # type: ignore[attr-defined]
        tracker.processed = tracker.completed = done  # type: ignore[attr-defined]


def _place(trainer: Trainer, step: int) -> tuple[int, int]:
    """Lightning's epoch of the step that follows ``step`` steps, and how many batches of this epoch come before it."""
    # trainer.limit_train_batches cuts the rows' epoch into several
    rows_epoch, limit = len(cast("Any", trainer.train_dataloader)), int(trainer.num_training_batches)
    before, rest = divmod(step, rows_epoch)
    epoch, batch = divmod(rest, limit)
    return before * math.ceil(rows_epoch / limit) + epoch, batch


def _validation_due(trainer: Trainer, step: int) -> bool:
    """Whether a run that was not interrupted validates after ``step`` steps."""
    every = trainer.val_check_batch
    if step == 0 or not trainer.enable_validation or every is None:  # by wall-clock time: there is no such step
        return False
    if trainer.check_val_every_n_epoch is None:
        return step % every == 0
    epoch, batch = _place(trainer, step - 1)
    return (epoch + 1) % trainer.check_val_every_n_epoch == 0 and (batch + 1) % every == 0
