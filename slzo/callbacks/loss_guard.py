"""Takes a run back when the dev loss jumps: smaller steps from the last good weights."""

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from slzo.callbacks.exact_resume import is_of_interval
from slzo.console import say
from slzo.datamodule import TaskDataModule
from slzo.errors import SlzoError
from slzo.evaluation.evaluator import score_rows
from slzo.module import ZOModule
from slzo.zo.go_back import go_back

# How far the loss of n dev rows may rise above its lowest, times the root of n: 5% with 200 rows. Rewards and F1 vary more.
_OF_LOSSES, _OF_METRICS = 0.7, 2.0


class LossGuard(Callback):
    """Halves the learning rate and goes back to the last good weights when the dev loss rises too far above its lowest.

    Where training maximizes a reward, its distance to the best reward takes the place of the loss.

    The optimizer forgets its momentum too, which came from what went wrong. The guard keeps one more float32 copy of what is
    tuned; where that is more than 2 GiB it only halves the rate, and momentum stays. It looks at the validations of the run's
    interval, not at one that only the end of a run brings.

    Args:
        factor: Dev loss over the lowest so far that is too much, > 1; auto is 1 + 0.7 / sqrt(dev rows), 1.05 with 200 (of rewards
            and F1 1 + 2 / sqrt(dev rows)); null lets a run go on whatever it does.
    """

    def __init__(self, factor: float | Literal["auto"] | None = "auto") -> None:
        if factor is not None and factor != "auto" and not 1 < factor < math.inf:
            raise SlzoError(f"guard.factor {factor}: must be above 1, or auto, or null to guard nothing; 1.05 is usual")
        self.factor = factor
        self.times = 0
        self._lowest = math.inf
        self._good: dict[str, Tensor] | None = None
        self._good_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the dev rows before training; their prefix states are needed later anyway."""
        if self.factor is None or not isinstance(pl_module, ZOModule) or getattr(trainer, "fast_dev_run", False):
            return
        if not pl_module.resumed:
            self.times, self._lowest = 0, math.inf
            datamodule = pl_module.datamodule
            if trainer.enable_validation and datamodule.rows("dev"):
                found = score_rows(
                    pl_module.evaluator,
                    datamodule.val_dataloader(),
                    datamodule.make_metrics(),
                    keep_prefix=True,
                    also=datamodule.also,
                )
                self._note(trainer, pl_module, datamodule.judge.distance(found))
        elif self._good is None:
            self._keep(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the dev loss with the lowest so far."""
        if self.factor is None or not is_of_interval(trainer) or not isinstance(pl_module, ZOModule):
            return
        loss = pl_module.datamodule.judge.distance(trainer.callback_metrics, "val/")
        factor = self.factor if self.factor != "auto" else _usual_factor(pl_module.datamodule)
        if loss <= factor * self._lowest:
            self._note(trainer, pl_module, loss)
        elif self._lowest < math.inf:
            self._take_back(pl_module, trainer.optimizers[0], loss, factor)

    def _note(self, trainer: Trainer, module: ZOModule, loss: float) -> None:
        if loss < self._lowest:
            self._lowest = loss
            self._keep(trainer, module)

    def _keep(self, trainer: Trainer, module: ZOModule) -> None:
        assert module.tuned_model is not None
        tensors = module.tuned_model.tensors
        self._good_step = trainer.global_step
        self._good = tensors.copy_of_masters() if 4 * tensors.num_elements <= tensors.hold_bytes else None

    @property
    def good(self) -> dict[str, Tensor] | None:
        """The masters that had the lowest dev loss; ``None`` if they are not kept."""
        return self._good

    def _take_back(self, module: ZOModule, optimizer: Optimizer, loss: float, factor: float) -> None:
        assert module.tuned_model is not None
        self.times += 1
        schedulers = [config.scheduler for config in module.trainer.lr_scheduler_configs]
        step_size = module.step_size if module.optimizer_choice.automatic else None
        go_back(module.tuned_model.tensors, self._good, optimizer, schedulers, step_size)
        if module.recorder is not None:
            module.recorder.went_back(module.global_step, -1 if self._good is None else self._good_step)
        back = f", weights back at those of step {self._good_step}" if self._good is not None else ""
        words = module.datamodule.judge.words
        say(
            f"\nThe {words} rose to {loss:.4g}, over {factor:.3g} times its lowest, {self._lowest:.4g}: learning rate "
            f"halved{back} (time {self.times})."
        )

    def state_dict(self) -> dict[str, Any]:
        """The lowest dev loss and the weights that had it."""
        return {"times": self.times, "lowest": self._lowest, "good": self._good, "good_step": self._good_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.times, self._lowest = state_dict["times"], state_dict["lowest"]
        self._good, self._good_step = state_dict["good"], state_dict["good_step"]


def _usual_factor(datamodule: TaskDataModule) -> float:
    noise = _OF_LOSSES if datamodule.judge.best is None else _OF_METRICS
    rows = len(datamodule.splits.dev) if datamodule.splits is not None else 1
    return 1 + noise / math.sqrt(max(1, rows))
