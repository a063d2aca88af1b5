"""Detects steps that make no progress, or do not log what a callback monitors."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.utils import get_total_norm

from slzo.callbacks.hooks import returned, zo_module
from slzo.lightning.trainer_options import STEP_METRICS, check_monitors
from slzo.module import ZOModule
from slzo.utils.argument_checks import check_at_least
from slzo.utils.console import rank_zero_warn
from slzo.utils.errors import SlzoError
from slzo.utils.pluralize import pluralize
from slzo.zo.objectives import GenerationObjective
from slzo.zo.stepper import StepResult

_MAX_GROWTH = 100.0


class StepWatch(Callback):
    """Warns at the first step whose gradient is exactly 0, with the reason, and stops the run after several of them.

    With weight perturbation these are the projected gradients, the slopes along all directions of the step.

    If the loss is a metric or a reward, it often does not change, and the callback only warns.

    Stops the run at the first step that is logged if a callback monitors a value ``train/...`` that is not among those logged.

    Args:
        max_zero_steps: Stop after this many steps in a row whose gradient is exactly 0.
    """

    def __init__(self, max_zero_steps: int = 20) -> None:
        check_at_least("watch.max_zero_steps", max_zero_steps)
        self.max_zero_steps = max_zero_steps
        self._size_at_start: float | None = None
        self._zeros = 0
        self._warned_of_rate = False
        self._checked_monitors = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the size of the tuned tensors; a resumed run keeps the size at the first start."""
        module = zo_module(pl_module)
        if not module.prepared.resumed or self._size_at_start is None:
            self._zeros, self._size_at_start = 0, _size(module)
            self._warned_of_rate = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        module = zo_module(pl_module)
        result: StepResult = returned(module, "training_step", outputs, "result")
        if not result.estimate.finite:
            return
        if not self._checked_monitors and not outputs.get("values"):  # all values of this step are logged
            self._checked_monitors = True
            logged = [name for name in sorted(trainer.callback_metrics) if name.startswith(STEP_METRICS)]
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            check_monitors(callbacks, logged, logs_more=type(module) is not ZOModule, of_steps=True)
        estimate, stepper, objective = result.estimate, module.stepper, module.datamodule.objective
        if result.record.lr == 0 and stepper.rate is not None and not self._warned_of_rate:
            self._warned_of_rate = True
            rank_zero_warn(
                f"the automatic learning rate is 0 at step {trainer.global_step}, because the loss is not above its lower bound "
                f"{objective.lowest:g}; raise data.objective.best of a reward, or give model.optimizer.lr a "
                "number"
            )
        if any(estimate.slopes):
            self._zeros = 0
            return
        self._zeros += 1
        if objective.generates or not objective.differentiable or estimate.loss == 0:
            steps = trainer.max_steps if trainer.max_steps > 0 else self.max_zero_steps
            if self._zeros == min(steps, self.max_zero_steps):  # a short run has fewer
                rank_zero_warn(_no_difference(module, estimate.loss, self._zeros))
            return
        what = "projected gradient" if stepper.estimator.perturbs == "weights" else "gradient"
        if self._zeros == 1:
            rank_zero_warn(
                f"the {what} is exactly 0 at step {trainer.global_step}, so nothing is learned: "
                f"{_reason(module, self._size_at_start)}"
            )
        if self._zeros >= self.max_zero_steps:
            raise SlzoError(
                f"the {what} was exactly 0 for {pluralize(self._zeros, 'step')} in a row, the last at step "
                f"{trainer.global_step}: {_reason(module, self._size_at_start)} (watch.max_zero_steps {self.max_zero_steps})"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"size_at_start": self._size_at_start, "zeros": self._zeros}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._size_at_start, self._zeros = state_dict["size_at_start"], state_dict["zeros"]


def _size(module: ZOModule) -> float:
    """Return the root mean square of the tuned tensors."""
    tensors = module.stepper.model.tensors
    return float(get_total_norm(master.detach() for master in tensors.masters)) / math.sqrt(tensors.num_elements)


def _no_difference(module: ZOModule, loss: float, steps: int) -> str:
    """Return what it means that a loss without a derivative did not change for some steps, and what to do."""
    objective = module.datamodule.objective
    if not isinstance(objective, GenerationObjective) or module.stepper.estimator.perturbs == "weights":
        return f"the loss, {loss:.4g}, did not change along any direction for {pluralize(steps, 'step')}"
    answers = f"all {objective.sampling.samples} answers to each row"
    what = f"for {pluralize(steps, 'step')} {answers} were equally good (mean loss {loss:.4g})"
    # a reward above the largest possible one has another scale, which is not known
    if math.isclose(loss, objective.lowest, rel_tol=1e-6):
        return f"{what}, the best one: there is nothing left to learn"
    return (
        f"{what}, so nothing is learned; use a reward or metric with more levels, a prompt with an example of a good answer, or "
        "more answers (data.objective.samples of the objective Reward)"
    )


def _reason(module: ZOModule, at_start: float | None) -> str:
    """Return why no direction changes the loss, and what to do."""
    now = _size(module)
    if at_start and not now < _MAX_GROWTH * at_start:
        return (
            f"the tuned tensors grew by a factor of {now / at_start:.3g} because the steps are too large; lower the learning "
            f"rate (model.optimizer.lr {module.trainer.optimizers[0].param_groups[0]['lr']:.3g})"
        )
    if module.stepper.estimator.perturbs != "weights":
        return (
            "the gradient is exactly 0; lower the learning rate if the loss jumped before, or use another layer or "
            "model.estimator SPSA"
        )
    eps = module.stepper.eps
    smallest_change = now * torch.finfo(getattr(torch, module.options.dtype)).eps
    if eps < smallest_change:
        return (
            f"model.eps {eps:.3g} is lost in rounding: entries of size {now:.2g} in {module.options.dtype} change in steps of "
            f"about {smallest_change:.1g}; raise it, for example to 1e-3"
        )
    return (
        f"no direction changes the loss (eps {eps:.3g}, entries of size {now:.2g}); raise model.eps, or lower the "
        "learning rate if the loss jumped before"
    )
