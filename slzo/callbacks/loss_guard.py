"""Rolls back to the last good weights and takes smaller steps when the dev loss spikes."""

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.callbacks.hooks import zo_module
from slzo.lightning.trainer_state import dev_batches, is_quick, num_dev_rows, validation_due
from slzo.module import ZOModule
from slzo.training.scored import scores_are_comparable
from slzo.training.time_plan import Passes
from slzo.utils.console import rank_zero_print, rank_zero_warn
from slzo.utils.errors import SlzoError
from slzo.zo.stepper import Snapshot

# Allowed relative rise of the loss of n dev rows, times sqrt(n): 5% with 200 rows. Rewards and F1 vary more.
_LOSS_NOISE, _METRIC_NOISE = 0.7, 2.0


class LossGuard(Callback):
    """Rolls back to the last good weights and halves the learning rate when the dev loss rises too far above its lowest value.

    If training maximizes a reward, the guard uses its distance to the best reward
    (:class:`slzo.evaluation.selection_metric.SelectionMetric`) instead of the loss.

    It rolls back after callbacks have saved the weights that were scored, and before :class:`LastCheckpoint` saves. A rollback
    also clears the optimizer's momentum. The guard keeps one more float32 copy of the tuned tensors. If that takes
    more than 2 GiB, the guard only halves the rate, and the momentum stays. It ignores a validation that is not scheduled, such
    as the one at the end of a run, and one whose reward is unknown because its functions failed at every row.

    Args:
        factor: Largest allowed dev loss as a multiple of the lowest so far, > 1; auto is 1 + 0.7 / sqrt(dev rows), 1.05 with 200
            (1 + 2 / sqrt(dev rows) for rewards and F1); null never rolls back. Below a tenth of the first dev
            loss, the rise may be as large as at that tenth.

    Attributes:
        rollbacks: Number of rollbacks.
    """

    def __init__(self, factor: float | Literal["auto"] | None = "auto") -> None:
        if factor is not None and factor != "auto" and not 1 < factor < math.inf:
            raise SlzoError(f"guard.factor {factor}: must be above 1, or auto, or null for no rollback; 1.05 is usual")
        self.factor = factor
        self.rollbacks = 0
        self._spike: tuple[float, float] | None = None  # dev loss and factor of a rollback that is still to be done
        self._first = self._lowest = math.inf
        self._good: Snapshot | None = None
        self._is_comparable = True
        self._warned_of_best = False

    @property
    def passes(self) -> Passes:
        """What this callback scores besides validations."""
        return Passes(dev_before=int(self.factor is not None))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the dev rows before training; their prefix states are needed later anyway."""
        if self.factor is None or is_quick(trainer):
            return
        module = zo_module(pl_module)
        self._warned_of_best = False
        if trainer.enable_validation and trainer.val_check_batch is None:
            rank_zero_warn(
                "guard: with a time as trainer.val_check_interval and no trainer.max_time the run does not roll back after a "
                "spike; give a number of steps, or trainer.max_time"
            )
        if not module.prepared.resumed:
            self._first, self._lowest, self._spike = math.inf, math.inf, None
            if trainer.global_step == 0:  # otherwise it is another fit of this trainer
                self.rollbacks = 0
            data = module.datamodule
            if trainer.enable_validation and data.rows("dev"):
                found = data.score(module.evaluator, dev_batches(trainer, data), keep_prefix=True)
                self._note(trainer, module, data.selection_metric.distance(found))
        elif self._good is None:
            self._keep(trainer, module)

    @property
    def will_roll_back(self) -> bool:
        """Whether the weights that were just scored will be replaced by earlier ones."""
        return self._spike is not None and self._good is not None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Roll back if that is still to be done, without a :class:`LastCheckpoint`, or after a resume."""
        self.roll_back(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.roll_back(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.factor is None or not validation_due(trainer):
            return
        module = zo_module(pl_module)
        metric = module.datamodule.selection_metric
        loss = metric.distance(trainer.callback_metrics, "val/")
        if metric.best is not None and math.isnan(loss):
            return  # the reward failed at every row, which says nothing about the weights
        if (factor := self.factor) == "auto":
            noise = _LOSS_NOISE if metric.best is None else _METRIC_NOISE
            factor = 1 + noise / math.sqrt(max(1, num_dev_rows(trainer, module.datamodule)))
        if self._lowest == math.inf or loss <= metric.upper_bound(self._lowest, factor, self._first):
            self._note(trainer, module, loss)
        else:
            self._spike = loss, factor

    def _note(self, trainer: Trainer, module: ZOModule, loss: float) -> None:
        metric = module.datamodule.selection_metric
        if metric.best is not None and loss < 0 and not self._warned_of_best:
            self._warned_of_best = True
            rank_zero_warn(
                f"guard: the mean dev {metric.name} is {metric.best - loss:.4g}, above the largest possible one, "
                f"{metric.best:g}; set data.objective.best of the objective Reward to the largest possible {metric.name}"
            )
        if loss <= self._lowest:  # if rewards are equal, the newest counts
            self._first = loss if self._first == math.inf else self._first
            self._lowest = loss
            self._keep(trainer, module)

    def _keep(self, trainer: Trainer, module: ZOModule) -> None:
        stepper = module.stepper
        self._good = stepper.snapshot(trainer.global_step) if stepper.model.tensors.may_be_copied else None

    def roll_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Roll back if the last validation found a spike and this has not been done."""
        if self._spike is None:
            return
        (loss, factor), self._spike = self._spike, None
        module = zo_module(pl_module)
        self.rollbacks += 1
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        # the logged steps were taken without this rollback, for example because that run validated less often
        module.stepper.stop_repeating()
        make = module.prepared.options.optimizer.make
        module.stepper.rollback(self._good, trainer.global_step, trainer.optimizers[0], schedulers, make)
        back = f", weights rolled back to step {self._good.step}" if self._good is not None else ""
        rank_zero_print(
            f"\nThe {module.datamodule.selection_metric.loss_name} rose to {loss:.4g}, over {factor:.4g} times its lowest, "
            f"{self._lowest:.4g}: learning rate halved{back} (rollback {self.rollbacks})."
        )

    def state_dict(self) -> dict[str, Any]:
        """The lowest dev loss and the weights that had it, and the spike after which it is still to roll back."""
        good = None if self._good is None else self._good._asdict()
        found = {"rollbacks": self.rollbacks, "first": self._first, "lowest": self._lowest, "good": good}
        return found if self._spike is None else {**found, "spike": self._spike}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether the dev loss of the checkpoint can be compared with later ones."""
        module = zo_module(pl_module)
        in_fit = trainer.state.fn == "fit"
        self._is_comparable = in_fit and scores_are_comparable(checkpoint, module.prepared, module.datamodule, "dev")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollbacks = state_dict["rollbacks"]
        if not self._is_comparable:
            self._first, self._lowest, self._good = math.inf, math.inf, None
            return
        self._spike = state_dict.get("spike")
        self._first, self._lowest = state_dict["first"], state_dict["lowest"]
        self._good = None if state_dict["good"] is None else Snapshot(**state_dict["good"])
