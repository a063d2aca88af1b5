"""A progress bar that counts steps, not epochs; without a terminal, a line after each validation."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from slzo.utils.console import rank_zero_print
from slzo.utils.duration import duration

# short, so that the dev metrics fit into 80 columns
_FORMAT = "{n_fmt}/{total_fmt} |{bar:6}| {elapsed}<{remaining}{postfix}"


class StepProgressBar(TQDMProgressBar):
    """One bar from the first to the last step; zeroth-order runs are measured in steps.

    Bars are written to standard error, all other lines to standard output. If standard error is not a terminal, a
    line after each validation replaces the bar. For ``refresh_rate`` see Lightning.
    """

    _steps: Tqdm | None = None
    _begun: tuple[float, int] | None = None  # time and number of the first step

    @property
    def is_disabled(self) -> bool:
        return bool(super().is_disabled) or not sys.stderr.isatty()

    def _bar(self, description: str, leave: bool = True, position: int = 0, **options: Any) -> Tqdm:
        options |= {"disable": self.is_disabled, "dynamic_ncols": True, "file": sys.stderr}
        return Tqdm(desc=description, leave=leave, position=position, **options)

    def init_sanity_tqdm(self) -> Tqdm:
        return self._bar("Checking", leave=False)

    def init_validation_tqdm(self) -> Tqdm:
        in_fit = self.trainer.state.fn == "fit"
        return self._bar("Validation", leave=not in_fit, position=int(in_fit))

    def init_test_tqdm(self) -> Tqdm:
        return self._bar("Testing")

    def init_predict_tqdm(self) -> Tqdm:
        return self._bar("Predicting")

    def init_train_tqdm(self) -> Tqdm:
        total = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        options: dict[str, Any] = {} if total is None else {"bar_format": _FORMAT}
        self._steps = self._bar("Training", total=total, initial=self.trainer.global_step, unit="step", **options)
        return self._steps

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        self._begun = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._begun is None:  # other callbacks may have scored rows in on_train_start
            self._begun = time.monotonic(), trainer.global_step

    def on_train_epoch_start(self, *_: Any) -> None:
        """Do nothing: the bar continues across epochs."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics shown after the bar, dev metrics first, with four digits."""
        found = super().get_metrics(trainer, pl_module).items()
        shown = {name: f"{value:.4g}" for name, value in found if isinstance(value, float)}
        return dict(sorted(shown.items(), key=lambda item: (not item[0].startswith("val/"), item[0] == "val/loss")))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.is_disabled:
            return
        bar = self.train_progress_bar
        if trainer.global_step % self.refresh_rate == 0 or trainer.global_step == bar.total:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(trainer.global_step - bar.n)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking or sys.stderr.isatty() or super().is_disabled:
            return
        metrics = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
        rank_zero_print(f"Step {trainer.global_step:<6d}{metrics}{self._times(trainer)}")

    def _times(self, trainer: Trainer) -> str:
        """Return the time since the first step, and an estimate of the remaining time."""
        if self._begun is None:
            return ""
        started, first_step = self._begun
        seconds, done = time.monotonic() - started, trainer.global_step - first_step
        remaining = trainer.max_steps - trainer.global_step
        left = f", {duration(seconds / done * remaining)} left" if done > 0 and remaining > 0 else ""
        return f"  ({duration(seconds)}{left})"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the line of the bar, so that the next message is readable."""
        if self._steps is not None:
            self._steps.close()
