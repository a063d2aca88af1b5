"""Keeps the best state of a run, and the newest one in ``checkpoints/last.ckpt``."""

import math
import signal
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from slzo.callbacks.loss_guard import LossGuard
from slzo.callbacks.stop_signals import StopSignals, max_over_processes
from slzo.checkpoints.find import best_file
from slzo.lightning.trainer_state import callback_of, folder_of, is_last_step, validation_due
from slzo.module import ZOModule
from slzo.private.lightning import count_epoch_as_started, count_step_as_open, drop_ready_step
from slzo.task_data import TaskData
from slzo.training.scored import scores_are_comparable
from slzo.utils.argument_checks import check_at_least
from slzo.utils.console import rank_zero_print
from slzo.utils.environment import command_line
from slzo.utils.errors import Interrupted, SlzoError
from slzo.utils.files import check_inside, copy_file
from slzo.utils.run_layout import CHECKPOINTS_FOLDER, LAST_FILE
from slzo.utils.slurm import PREEMPTION, job_id, requeue

AUTO_MONITOR = "auto"
_REPLACED = {
    "save_last": "last_checkpoint writes last.ckpt; leave it out",
    "save_on_train_epoch_end": "only validated states are saved; leave it out",
    "every_n_train_steps": "only validated states are saved; for others set last_checkpoint.every_n_steps",
    "train_time_interval": "only validated states are saved; for others set last_checkpoint.every_minutes",
}


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint; a resumed run takes over the best state of the run that it continues.

    With ``monitor`` auto it watches val/loss, or val/reward or val/f1 if training maximizes that metric. By default ``mode`` is
    max for a monitored metric whose larger values are better, such as val/accuracy, and min otherwise.

    Raises:
        SlzoError: An option is set that would write ``last.ckpt``, or save states that are not validated.

    Attributes:
        chooses_mode: Whether ``mode`` was left out and is not chosen yet.
    """

    def __init__(
        self,
        monitor: str | None = AUTO_MONITOR,
        mode: str | None = None,
        filename: str | None = "step={step}",
        auto_insert_metric_name: bool = False,
        **options: Any,
    ) -> None:
        for name, instead in _REPLACED.items():
            if options.pop(name, None):
                raise SlzoError(f"checkpoint.{name}: {instead}")
        # the state is saved after a validation, before LastCheckpoint saves, which names it
        options["save_on_train_epoch_end"] = False
        super().__init__(
            monitor=monitor,
            mode="min" if mode is None else mode,
            filename=filename,
            auto_insert_metric_name=auto_insert_metric_name,
            **options,
        )
        self.chooses_mode = mode is None
        self._resumed: str | Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_inside("checkpoint.filename", self.filename or "", "set the folder with checkpoint.dirpath")
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, TaskData):
            if self.monitor == AUTO_MONITOR:
                metric = data.selection_metric
                self.monitor = f"val/{metric.name}"
                self._set_mode(metric.mode)
            elif self.chooses_mode:
                self._set_mode("max" if self.monitor in data.maximized_metrics else "min")
        super().setup(trainer, pl_module, stage)

    def _set_mode(self, mode: Literal["min", "max"]) -> None:
        self.mode, self.chooses_mode = mode, False  # once: a later stage keeps the best value
        self.kth_value = torch.tensor(math.inf if mode == "min" else -math.inf)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note which checkpoint is resumed: the paths in it are relative to the folder in which its run was started.

        Its best state is not taken over if its score cannot be compared with later ones.
        """
        self._resumed = trainer.ckpt_path if trainer.state.fn == "fit" else None
        if self._resumed is not None and isinstance(pl_module, ZOModule):
            data = pl_module.datamodule
            if not scores_are_comparable(checkpoint, pl_module.prepared, data, "dev"):
                self._resumed = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score and path; the file of an earlier run in another folder is never deleted.

        The state of a checkpoint that is only scored is not used: it is not part of a later training.
        """
        if self._resumed is None:
            return
        self.best_model_score = state_dict["best_model_score"]
        self.kth_value = state_dict["kth_value"]
        self.best_model_path = self._place(state_dict["best_model_path"])
        self.kth_best_model_path = self._place(state_dict["kth_best_model_path"])
        self.best_k_models = {self._place(path): score for path, score in state_dict["best_k_models"].items()}

    def _place(self, path: str) -> str:
        """Return the path of the file of an earlier state."""
        assert self._resumed is not None
        return str(best_file(path, self._resumed).absolute()) if path else path

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state if it is the best one, unless a rollback follows."""
        guard = callback_of(trainer, LossGuard)
        if guard is None or not guard.will_roll_back:
            super().on_validation_end(trainer, pl_module)


class LastCheckpoint(Checkpoint):
    """Saves after validations, between them, at the end, and when a signal stops the run.

    It saves only where Lightning can restart exactly: after a validation, and after a step that no validation follows. Ctrl-C
    and SIGTERM stop a run at the next such place, which is the same for all processes. A second signal stops it at once without
    saving. With weight perturbation a later resume repeats the lost steps from the log of losses. In a SLURM job SIGUSR1 also
    stops it there, and then the job goes back into the queue.

    The state after the last step replaces ``last.ckpt`` only when everything else is done. A run that is killed while its
    held-out rows are scored therefore has steps left, and a resume finishes it normally. The last step is always validated,
    because it may be the best one.

    As a ``Checkpoint`` it runs after :class:`BestCheckpoint`, whose state it saves.

    Args:
        every_n_steps: Interval between two saves in steps; by default only the time counts.
        every_minutes: Interval between two saves in minutes. A crash loses at most this; 0 saves only by steps and
            after validations.

    Attributes:
        saved: File of the last state that this run saved; ``None`` before the first one.
    """

    def __init__(self, every_n_steps: int | None = None, every_minutes: float = 5.0) -> None:
        check_at_least("last_checkpoint.every_n_steps", every_n_steps, advice="or leave it out")
        if not every_minutes >= 0:
            raise SlzoError(
                f"last_checkpoint.every_minutes {every_minutes}: must be 0 or more; 0 saves only by steps and validations"
            )
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self._signals = StopSignals()
        self._in_epoch = False
        self._every_n_epoch: int | None = None  # the schedule's value while the last validation is forced
        self._begin()

    def _begin(self) -> None:
        """Forget what an earlier training of the same trainer has saved."""
        self._first_step = self._saved_step = self._final_step = -1
        self._saved_at = -math.inf
        self.saved: Path | None = None
        self._final: Path | None = None  # holds the state after the last step until everything else is done
        self._stop = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier training has saved."""
        self._begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals. The first step is saved, so that a resume after a crash has a checkpoint."""
        if trainer.received_sigterm:  # the signal came before this handler was installed
            raise Interrupted(signal.SIGTERM)
        self._first_step = trainer.global_step
        self._signals.install()

    def on_train_batch_start(self, *_: Any) -> None:
        """Stop before the step if a signal came; otherwise later signals wait until the step is done."""
        if self._stop:
            raise Interrupted(self._stop, saved=True)
        self._signals.waits = self._in_epoch = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save, unless a validation follows."""
        if validation_due(trainer):
            return
        if not is_last_step(trainer):
            self._save_if_due(trainer)
        elif trainer.enable_validation:
            # Lightning validates the step at which it stops, but not in an epoch without validations
            self._every_n_epoch = trainer.check_val_every_n_epoch
            trainer.check_val_every_n_epoch = None
            trainer.should_stop = True
        else:
            self._save_final(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_schedule(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and is_last_step(trainer):
            self._keep_resumed(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; what :class:`BestCheckpoint` has just written or deleted is part of the state."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if (guard := callback_of(trainer, LossGuard)) is not None:
            guard.roll_back(trainer, pl_module)
        if is_last_step(trainer):
            self._save_final(trainer)
        elif validation_due(trainer):
            self._save_if_due(trainer, always=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_epoch = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct Lightning's counts, so that a restart continues exactly here."""
        if self._in_epoch:
            count_epoch_as_started(checkpoint)
        if trainer.state.fn == "fit" and trainer.validating and not validation_due(trainer):
            count_step_as_open(checkpoint)
        drop_ready_step(checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.remove()
        self._restore_schedule(trainer)
        folder = _folder(trainer)
        if folder is None:
            return
        if trainer.global_step == self._first_step and trainer.ckpt_path is not None:
            # without a step, Lightning's counts are those of the restart, and a later resume would miscount
            self._keep_resumed(trainer)
        elif self._final_step != trainer.global_step:  # another callback has ended the training
            if self._saved_step != trainer.global_step:
                trainer.save_checkpoint(folder / LAST_FILE, weights_only=False)
        elif trainer.is_global_zero and self._final is not None:
            self._final.replace(folder / LAST_FILE)
        self._saved_step = trainer.global_step  # for an error in a later hook

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print how to continue, forward a signal, and put a preempted job back into the queue."""
        self._signals.remove()
        self._restore_schedule(trainer)
        stopped = exception if isinstance(exception, Interrupted) else None
        launcher: Any = trainer.strategy.launcher
        if stopped is not None and not stopped.saved and hasattr(launcher, "kill"):
            launcher.kill(stopped.number)  # the processes that this one has started
        # no collective call: the other processes may be elsewhere
        if self._final is not None and trainer.is_global_zero:
            self._final.unlink(missing_ok=True)
        if self.saved is not None and self.saved.is_file() and not isinstance(exception, SlzoError):
            by_command = f"the same command and --ckpt_path {self.saved}"
            way = by_command if command_line() is not None else f"trainer.fit(..., ckpt_path={str(self.saved)!r})"
            rank_zero_print(
                f"\nStopped at step {trainer.global_step}; continue from step {self._saved_step} with {way}"
            )
        job = job_id()
        trains = trainer.state.fn == "fit"
        preempted = trains and stopped is not None and stopped.number == PREEMPTION
        # before the first step the first process may be waiting for one that has ended
        if job is not None and preempted and (trainer.is_global_zero or self.saved is None):
            has_state = self.saved is not None or trainer.ckpt_path is not None
            rank_zero_print(requeue(job, continues=has_state, by_script=command_line() is None))

    def _restore_schedule(self, trainer: Trainer) -> None:
        if self._every_n_epoch is not None:
            trainer.check_val_every_n_epoch = self._every_n_epoch
            self._every_n_epoch = None

    def _save_if_due(self, trainer: Trainer, always: bool = False) -> None:
        """Save if it is time or a signal came; after a signal, the next step does not begin."""
        step = trainer.global_step
        waited = time.monotonic() - self._saved_at
        waited_enough = self._saved_step < 0 or 0 < 60 * self.every_minutes <= waited
        self._stop, is_time = max_over_processes(trainer, self._signals.requested, waited_enough)
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        if always or self._stop or by_steps or is_time:
            folder = _folder(trainer)
            if folder is not None:
                trainer.save_checkpoint(folder / LAST_FILE, weights_only=False)
                self._saved_step = step
                self.saved = folder / LAST_FILE
            self._saved_at = time.monotonic()

    def _keep_resumed(self, trainer: Trainer) -> None:
        """Copy the checkpoint that a resumed run continues to its ``last.ckpt``, if the run takes one step or none.

        Otherwise the best checkpoint, which has no steps left, would be all that a later resume finds in its folder.
        """
        folder = _folder(trainer)
        if folder is None or self.saved is not None or trainer.ckpt_path is None or not trainer.is_global_zero:
            return
        resumed = Path(trainer.ckpt_path)
        if resumed.is_file() and not (folder / LAST_FILE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            copy_file(resumed, folder / LAST_FILE)

    def _save_final(self, trainer: Trainer) -> None:
        """Save the state after the last step, and stop if a signal came."""
        folder = _folder(trainer)
        if folder is not None:
            self._final = folder / f"{LAST_FILE}.final"
            trainer.save_checkpoint(self._final, weights_only=False)
            self._final_step = trainer.global_step
        self._signals.waits = False
        (stop,) = max_over_processes(trainer, self._signals.requested)
        if stop:
            raise Interrupted(stop, saved=True)


def _folder(trainer: Trainer) -> Path | None:
    """Return the folder of the checkpoints; ``None`` if nothing is written. A collective call."""
    folder = folder_of(trainer)
    return None if folder is None else folder / CHECKPOINTS_FOLDER
