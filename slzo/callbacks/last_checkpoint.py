"""Keeps the best state of a run, and the newest in ``checkpoints/last.ckpt``, whatever ends the run."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from slzo.console import say
from slzo.errors import Interrupted, SlzoError

AUTO_MONITOR = "auto"
# With several processes all must agree that it is time; asking costs a message.
_STEPS_BETWEEN_QUESTIONS = 10


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint; a resumed run remembers the best state although it writes to a folder of its own.

    With ``monitor`` auto it watches val/loss, or val/reward or val/f1 where training maximizes that.
    """

    def watch(self, name: str, mode: Literal["min", "max"]) -> None:
        """What to watch where ``monitor`` is auto; before the run."""
        if self.monitor == AUTO_MONITOR:
            self.monitor, self.mode = name, mode
            self.kth_value = torch.tensor(math.inf if mode == "min" else -math.inf)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score and path; the file of the former run is never deleted."""
        for name in ("best_model_score", "best_model_path", "best_k_models", "kth_best_model_path", "kth_value"):
            setattr(self, name, state_dict[name])


class LastCheckpoint(Checkpoint):
    """Saves after every validation, between validations, at the end, and when the run is interrupted.

    Lightning's ``ModelCheckpoint(save_last=True)`` saves only when the monitored value improved, so a resume could lose steps.
    As a ``Checkpoint`` it runs after :class:`BestCheckpoint`, whose state it saves.

    Args:
        every_n_steps: Save after so many steps too; left out, by time alone.
        every_minutes: Save when the last save is so long ago: a crash loses at most this much; 0 saves by steps and validations
            alone.
    """

    def __init__(self, every_n_steps: int | None = None, every_minutes: float = 5.0) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise SlzoError(f"last_checkpoint.every_n_steps {every_n_steps}: must be at least 1, or left out")
        if not every_minutes >= 0:
            raise SlzoError(
                f"last_checkpoint.every_minutes {every_minutes}: must be 0 or more; 0 does not look at the time"
            )
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self._begun_step = self._saved_step = -1
        self._saved_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count; there is nothing to save yet."""
        self._begun_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save what the steps before this one did, if it is time: their validation is over by now."""
        step = trainer.global_step
        if step in (self._begun_step, self._saved_step):
            return
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        if by_steps or self._is_time(trainer):
            with _before_this_batch(trainer):
                self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save while training."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what an interrupt or a crash would lose; not the weights of a diverged run."""
        if isinstance(exception, SlzoError) or trainer.global_step == 0:
            return
        agreed = isinstance(exception, Interrupted) and exception.saves
        if isinstance(exception, Interrupted) and not agreed:  # within a step
            return
        if trainer.world_size > 1 and not agreed:  # the other processes do not know of it
            return
        path = self._save(trainer)
        if path is not None:
            say(f"\nInterrupted at step {trainer.global_step}; continue with the same command and --ckpt_path {path}")

    def _is_time(self, trainer: Trainer) -> bool:
        due = self.every_minutes > 0 and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        if trainer.world_size == 1:
            return due
        asked = self.every_minutes > 0 and trainer.global_step % _STEPS_BETWEEN_QUESTIONS == 0
        return asked and trainer.strategy.reduce_boolean_decision(due, all=False)

    def _save(self, trainer: Trainer) -> Path | None:
        log_dir = trainer.log_dir  # a collective call: every process must make it
        if log_dir is None or getattr(trainer, "fast_dev_run", False):
            return None
        path = Path(log_dir) / "checkpoints" / "last.ckpt"
        if self._saved_step != trainer.global_step:
            trainer.save_checkpoint(path, weights_only=False)
            self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        return path


@contextmanager
def _before_this_batch(trainer: Trainer) -> Iterator[None]:
    """Lightning's counters as they were between two steps, not with a batch begun that a resumed run would count again."""
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    is_last, progress.is_last_batch = progress.is_last_batch, False
    for count in (progress.total, progress.current):
        count.ready -= 1
    # a resumed run passes over the validation that it takes for done, and counts the step again with it
    counted_again = int(loop._should_check_val_fx(cast("Any", trainer.fit_loop._data_fetcher)))
    loop._batches_that_stepped -= counted_again
    try:
        yield
    finally:
        loop._batches_that_stepped += counted_again
        progress.is_last_batch = is_last
        for count in (progress.total, progress.current):
            count.ready += 1
