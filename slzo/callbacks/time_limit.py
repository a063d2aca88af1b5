"""Ends a training within trainer.max_time."""

import time
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.lightning.trainer_state import interval_of, scored_rows, step_limit, steps_per_epoch, validation_due
from slzo.task_data import TaskData
from slzo.training.time_plan import Passes, TimeBudget, TimePlan
from slzo.utils.console import rank_zero_print

_MARGIN = 1.1
_MAX_SLOWDOWN = 2.0


class TimeLimit(Callback):
    """Ends a run after a given time.

    :func:`slzo.fit.prepare` plans its steps and validations; this callback ends the run if they take longer.

    The run stops after the last step that leaves enough time for the last validation and the scores at the end. Without a plan,
    for other modules, it stops when the time is over.

    Args:
        seconds: Time of the whole ``fit``.
        every_seconds: Seconds between two validations, which become steps in the plan; ``None`` for an interval in
            steps.
    """

    def __init__(self, seconds: float, every_seconds: float | None = None) -> None:
        self.seconds = seconds
        self.every_seconds = every_seconds
        self._ends: float | None = None
        self._given: tuple[int, int | float] | None = None
        self._plan: TimePlan | None = None
        self._planned_at = 0.0
        self._slower = 1.0
        self._step_began = 0.0
        self._validation_began: float | None = None
        self._validation = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self._ends = time.monotonic() + self.seconds

    def given(self, trainer: Trainer) -> tuple[int, int | float]:
        """Return ``max_steps`` and ``val_check_interval`` as they were given to the trainer."""
        if self._given is not None:
            return self._given
        interval = interval_of(trainer)
        return trainer.max_steps, 1.0 if interval is None else interval

    def budget(self, trainer: Trainer, data: TaskData, done: int | None) -> TimeBudget:
        """Return the time of a run and its other limits. ``done`` is the step of the checkpoint that it continues, if any."""
        max_steps, interval = self.given(trainer)
        every = interval if isinstance(interval, int) else max(1.0, interval * steps_per_epoch(trainer, data))
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        passes = sum((own for each in callbacks if isinstance(own := getattr(each, "passes", None), Passes)), Passes())
        if done is not None:  # a continued run has the scores before training
            passes = replace(passes, dev_before=0, test_before=0)
        return TimeBudget(
            self.seconds,
            time.monotonic() + self.seconds if self._ends is None else self._ends,
            max_steps=step_limit(trainer, data, max_steps),
            done=trainer.global_step if done is None else done,
            every=every * (trainer.check_val_every_n_epoch or 1),
            every_seconds=self.every_seconds,
            sets_interval=trainer.check_val_every_n_epoch is None,
            dev_batches=len(scored_rows(trainer, data)),
            passes=passes,
        )

    def apply(self, trainer: Trainer, plan: TimePlan | None) -> None:
        """Let the trainer take the steps and validations of a plan."""
        if plan is None:
            return
        self._given, self._plan, self._planned_at = self.given(trainer), plan, time.monotonic()
        trainer.fit_loop.epoch_loop.max_steps = plan.steps
        if plan.every is not None:
            trainer.val_check_interval = plan.every

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock, unless :class:`slzo.lightning.trainer.ZOTrainer` has done so earlier."""
        if stage == "fit" and self._ends is None:
            self.begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the time of the scores before training with the planned one."""
        self._slower, self._validation, self._validation_began = 1.0, 0.0, None
        if self._plan is not None:
            took, planned = time.monotonic() - self._planned_at, self._plan.times.before
            # a second more, because other things are done too
            self._slower = min(_MAX_SLOWDOWN, max(1.0, took / (planned + 1.0)))

    def on_train_batch_start(self, *_: Any) -> None:
        """Record when a step begins, and how long the validation before it took, with its checkpoints."""
        self._step_began = time.monotonic()
        if self._validation_began is not None:
            self._validation = max(self._validation, self._step_began - self._validation_began)
            self._validation_began = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validation_began = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop if there is no time for another step."""
        if self._ends is None or trainer.global_step == trainer.max_steps or trainer.should_stop:
            return
        now = time.monotonic()
        needed = self._needed(now - self._step_began, validation_due(trainer))
        if trainer.strategy.broadcast(self._ends - now < needed):  # the first process decides
            trainer.should_stop = True
            planned = "" if self._plan is None else f" of {self._plan.steps}"
            rank_zero_print(
                f"\nStopping after step {trainer.global_step}{planned}: trainer.max_time leaves no time for another step."
            )

    def _needed(self, step: float, validates: bool) -> float:
        """Return the seconds that another step and all that follows it take."""
        if self._plan is None:
            return 0.0
        times = self._plan.times
        validation = max(self._validation, times.validation)
        return _MARGIN * (max(step, times.step) + (1 + validates) * validation + self._slower * times.after)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reset(trainer)

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        self._reset(trainer)

    def _reset(self, trainer: Trainer) -> None:
        """Restore the trainer's own limits."""
        if self._given is not None:
            trainer.fit_loop.epoch_loop.max_steps, trainer.val_check_interval = self._given
        self._ends = self._given = self._plan = None
