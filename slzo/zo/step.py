"""One zeroth-order step: estimate, update, restore. Every training loop of slzo calls :func:`take_step`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.optim import Optimizer

from slzo.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, Request
from slzo.zo.step_size import StepSize

_MOST_EPS = 1e30  # far beyond use, and a direction times it is a float32 still
_MOST_QUERIES = 1_000_000


@dataclass(frozen=True)
class StepOptions:
    """Size and number of the perturbations.

    Attributes:
        eps: Size of the perturbation, absolute, > 0; ``None`` until it is measured.
        eps_end: Where it goes over the run, by the same factor each step; ``None`` to stay.
        num_queries: Directions per step.
        clip_projected_grad: Limit of a step's projected gradient, in medians of those before it; ``None`` for none.

    Raises:
        SlzoError: One is out of range.
    """

    eps: float | None = 1e-3
    eps_end: float | None = None
    num_queries: int = 1
    clip_projected_grad: float | None = None

    def __post_init__(self) -> None:
        if self.eps is not None and not 0 < self.eps <= _MOST_EPS:
            raise SlzoError(
                f"model.eps {self.eps}: the perturbation must be a number above 0 and at most {_MOST_EPS}, or auto; 1e-3 is a "
                "good start"
            )
        if self.eps_end is not None and not 0 < self.eps_end <= _MOST_EPS:
            raise SlzoError(
                f"model.eps_end {self.eps_end}: must be a number above 0 and at most {_MOST_EPS}; leave it out to keep eps"
            )
        if not 1 <= self.num_queries <= _MOST_QUERIES:
            raise SlzoError(
                f"model.num_queries {self.num_queries}: at least 1 direction per step is needed, at most {_MOST_QUERIES}"
            )

        if self.clip_projected_grad is not None and not 1 <= self.clip_projected_grad < float("inf"):
            raise SlzoError(
                f"model.clip_projected_grad {self.clip_projected_grad}: a multiple of the usual size, at least 1; 10 is a good "
                "start, or leave it out"
            )

    def eps_at(self, step: int, max_steps: int) -> float:
        """Size of the perturbation at a step of a run of ``max_steps``."""
        if self.eps is None:
            raise SlzoError("model.eps auto: must be measured first, see slzo.zo.step_size; or give a number")
        if self.eps_end is None:
            return self.eps
        return self.eps * (self.eps_end / self.eps) ** min(1.0, step / max(1, max_steps - 1))


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        estimate: What it learned; the gradient is dropped, it is as large as what is tuned.
        update_norm: Length of the masters' move; ``None`` if it was not asked for, or the loss was not finite.
    """

    estimate: Estimate
    update_norm: float | None = None


@torch.no_grad()
def take_step(
    request: Request,
    estimator: Estimator,
    optimizer: Optimizer,
    *,
    step_size: StepSize | None = None,
    measure_update: bool = False,
    clip: Callable[[Estimate], None] | None = None,
) -> StepResult:
    """Estimate the gradient, let the optimizer move the masters, and write them to the live weights.

    An estimate that is not finite moves nothing: the optimizer is called without gradients, so that whoever counts its steps
    counts this one. ``optimizer`` is that of the masters; ``step_size`` learns from the estimate and sets its learning rate;
    ``measure_update`` takes a copy of the masters while the step lasts; ``clip`` may scale the gradient.
    """
    tuned = request.tuned
    before = [master.clone() for master in tuned.masters] if measure_update else None
    try:
        estimate = estimator.estimate(request)
        if step_size is not None:
            step_size.update(estimate)
            step_size.set_rate(optimizer, estimator)
        if clip is not None:
            clip(estimate)
        tuned.set_grad(estimate.gradient if estimate.finite else {})
        optimizer.step()
    finally:
        tuned.zero_grad()
        tuned.restore(tuned.names_of_step(request.seed, request.step))
    norm = None
    if before is not None and estimate.finite:
        moves = [(new - old).norm() for new, old in zip(tuned.masters, before, strict=True)]
        norm = float(torch.stack(moves).norm())
    return StepResult(replace(estimate, gradient={}), norm)
