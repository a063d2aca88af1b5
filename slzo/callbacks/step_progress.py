"""A progress bar that counts steps, not epochs."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class StepProgressBar(TQDMProgressBar):
    """One bar from the first to the last step; zeroth-order runs are measured in steps, and epochs mean little.

    Args:
        refresh_rate: Steps between two updates of the bar.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar at the step of a resumed run."""
        self.train_progress_bar = Tqdm(
            desc="Training",
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            initial=trainer.global_step,
            disable=self.is_disabled,
            dynamic_ncols=True,
            unit="step",
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The bar goes on over epochs."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        bar = self.train_progress_bar
        if trainer.global_step % self.refresh_rate == 0 or trainer.global_step == bar.total:
            bar.set_postfix(
                {k: f"{v:.4g}" for k, v in self.get_metrics(trainer, pl_module).items() if isinstance(v, float)},
                refresh=False,
            )
            bar.update(trainer.global_step - bar.n)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the line, so that a message after it is readable."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()
