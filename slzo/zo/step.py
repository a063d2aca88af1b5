"""One step on any module: estimate the gradient, clip it, set the learning rate, update the masters, restore the weights."""

from dataclasses import replace

import torch
from torch.optim import Optimizer

from slzo.utils.errors import SlzoError
from slzo.zo.auto_step import AutoRate
from slzo.zo.estimators.base import Estimate, Estimator, EstimatorContext, estimate_of
from slzo.zo.optim import set_rate


@torch.no_grad()
def take_step(
    context: EstimatorContext,
    estimator: Estimator,
    optimizer: Optimizer,
    *,
    auto: AutoRate | None = None,
    measure_update: bool = False,
) -> tuple[Estimate, float | None]:
    """Take one step on any module.

    If the estimate is not finite, the masters do not move. The optimizer is still called, without gradients, so that hooks
    which count its steps count this one too.

    Args:
        context: Tuned tensors, loss and random seed of the step.
        estimator: Estimates the gradient.
        optimizer: Updates the masters.
        auto: Clips the gradient and sets the learning rate.
        measure_update: Measure the norm of the update. This holds a copy of the masters during the step.

    Returns:
        The estimate without its gradient, which is as large as the tuned tensors, and the norm of the update. The norm is
        ``None`` if it was not measured or the loss was not finite.

    Raises:
        SlzoError: The optimizer has parameters of the module, which it would not move.
    """
    tuned = context.tuned
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(tensor.live) in updated for _, tensor in tuned.items()):
        raise SlzoError("take_step: the optimizer has parameters of the module; create it with tuned.masters instead")
    before = [master.clone() for master in tuned.masters] if measure_update else None
    try:
        estimate = estimate_of(estimator, context)
        if auto is not None:
            factor = auto.add(estimate) if estimate.finite else 1.0
            if not estimator.normalizes:  # otherwise a large slope makes no large step
                estimate.scale_gradient(factor)
            set_rate(optimizer, auto.rate(optimizer, estimator, context.num_queries))
        tuned.set_grad(estimate.gradient if estimate.finite else {})
        optimizer.step()
    finally:
        tuned.zero_grad()
        tuned.restore(tuned.names_of_step(context.seed, context.step))
    norm = None
    if before is not None and estimate.finite:
        moves = [(new - old).norm() for new, old in zip(tuned.masters, before, strict=True)]
        norm = float(torch.stack(moves).norm())
    return replace(estimate, gradient={}), norm
