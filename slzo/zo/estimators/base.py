"""The base class of estimators, what an estimator receives and what it returns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from slzo.utils.argument_checks import ChecksOverrides, check_at_least
from slzo.utils.errors import SlzoError, broken_contract, one_line, short_repr
from slzo.zo.loss import Loss
from slzo.zo.tuned import Gradient, TunedTensors


@dataclass(frozen=True)
class EstimatorContext:
    """What an estimator needs for one step.

    Attributes:
        tuned: The tuned tensors, which draw the directions.
        loss: The loss of the batch.
        seed: Seed of the run.
        step: Training step. Directions are drawn from (seed, step, query).
        eps: Absolute size of the perturbation of the weights, > 0; 0 for an estimator that perturbs none.
        num_queries: Number of directions, >= 1.
        queries_at_once: Number of directions that are drawn and evaluated together, so that small batches can be joined over
            several queries. Each takes as much memory as the masters.

    Raises:
        SlzoError: A number is below 1.
    """

    tuned: TunedTensors
    loss: Loss
    seed: int
    step: int
    eps: float = 1e-3
    num_queries: int = 1
    queries_at_once: int = 1

    def __post_init__(self) -> None:
        check_at_least("num_queries", self.num_queries)
        check_at_least("queries_at_once", self.queries_at_once)

    def query_batches(self) -> Iterator[range]:
        """Iterate over the queries in groups that are evaluated together.

        Raises:
            SlzoError: eps is not above 0, so there are no points to evaluate.
        """
        if not self.eps > 0:
            raise SlzoError(f"eps {self.eps}: must be above 0")
        for start in range(0, self.num_queries, self.queries_at_once):
            yield range(start, min(start + self.queries_at_once, self.num_queries))


@dataclass(frozen=True)
class Estimate:
    """Result of an estimator for one step.

    Attributes:
        loss: Loss at or around the current weights.
        loss_plus: Loss at ``w + eps z``, mean over queries.
        loss_minus: Loss at ``w - eps z``, mean over queries. Estimators that do not evaluate this point give the loss at ``w``,
            or ``loss_plus`` if they do not evaluate that either.
        projected_grad: Slope of the loss along each direction of the weights; empty if the estimator perturbs no weights.
        num_evaluations: Evaluations of the batch; a pass through some of the layers counts as a part of one.
        gradient: Gradient by name of the tuned tensor, float32; not used if the estimate is not finite.
        grad_norm: Norm of the gradient; ``None`` if the estimator perturbs the weights.
    """

    loss: float
    loss_plus: float
    loss_minus: float
    projected_grad: tuple[float, ...]
    num_evaluations: float
    gradient: Gradient
    grad_norm: float | None = None

    @property
    def slopes(self) -> tuple[float, ...]:
        """Slope of the loss along each direction of the weights, or the one along the gradient, which is its norm."""
        return self.projected_grad if self.projected_grad or self.grad_norm is None else (self.grad_norm,)

    @property
    def finite(self) -> bool:
        """Whether all losses and slopes are finite."""
        return all(map(math.isfinite, (self.loss, self.loss_plus, self.loss_minus, *self.slopes)))

    def scale_gradient(self, factor: float) -> None:
        """Multiply the gradient in place. The slopes stay as they are."""
        if factor != 1.0:
            for tensor in self.gradient.values():
                tensor.mul_(factor)


class Estimator(ChecksOverrides, ABC):
    """Estimates the gradient at the masters. Evaluations change the live weights; the caller restores them.

    Attributes:
        perturbs: What the estimator perturbs. "weights": the estimate is a sum of directions of the weights, from losses at
            points around the masters. Then eps is used, steps can be replayed from a log of the losses, and SGD with a measured
            rate is the default. "output": the output of the one tuned layer. ``None``: nothing, the whole loss is
            differentiated. For both AdamW with a rate relative to the weights is the default.
        normalizes: Whether the estimator divides the gradient by its size.
    """

    perturbs: ClassVar[Literal["weights", "output"] | None] = "weights"
    normalizes: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.perturbs not in ("weights", "output", None):
            raise TypeError(
                f"{cls.__qualname__}.perturbs is {short_repr(cls.perturbs)}; choose 'weights', 'output' or None"
            )

    @abstractmethod
    def estimate(self, context: EstimatorContext) -> Estimate:
        """Estimate the gradient, without changing the estimator or the masters."""

    def check(self, num_queries: int) -> None:
        """Check that the estimator can work with a number of directions.

        Raises:
            SlzoError: The estimator cannot work with this number. By default every number is accepted.
        """
        return

    def check_tuned(self, tuned: TunedTensors) -> None:
        """Check that the estimator can work with the tuned tensors.

        Raises:
            SlzoError: It cannot. By default all tensors are accepted.
        """
        return

    @abstractmethod
    def evaluations(self, num_queries: int) -> float:
        """Return the cost of a step with ``num_queries`` directions, as a number of forward passes of the whole batch."""

    def describe(self) -> str:
        """Describe the estimator in a few words, for the summary."""
        return type(self).__name__


def estimate_from_gradient(loss: float, gradient: Gradient, evaluations: float) -> Estimate:
    """Return the estimate of an estimator that perturbs no weights, from the loss at the masters."""
    return Estimate(loss, loss, loss, (), evaluations, gradient, grad_norm=float(get_total_norm(gradient.values())))


def estimate_of(estimator: Estimator, context: EstimatorContext) -> Estimate:
    """Return the estimate of a step.

    Raises:
        SlzoError: The estimator cannot work with this number of directions or with the tuned tensors, or does not return an
            estimate for them.
    """
    estimator.check(context.num_queries)
    estimator.check_tuned(context.tuned)
    estimate, masters = estimator.estimate(context), context.tuned.named_masters()
    wanted = "an Estimate with numbers, and a float32 gradient by name of the tuned tensor"
    if not isinstance(estimate, Estimate) or not isinstance(estimate.gradient, Mapping):
        raise broken_contract("model.estimator", estimator, f"estimate() returned {short_repr(estimate)}", wanted)
    try:
        estimate = _with_floats(estimate)
    except (TypeError, ValueError, RuntimeError) as error:
        problem = f"estimate() returned what is no number ({one_line(error)})"
        raise broken_contract("model.estimator", estimator, problem, wanted) from error
    if estimator.perturbs == "weights" and not estimate.projected_grad:
        raise broken_contract("model.estimator", estimator, "estimate() returned no projected_grad", wanted)
    if estimator.perturbs != "weights" and estimate.grad_norm is None:
        raise broken_contract("model.estimator", estimator, "estimate() returned no grad_norm", wanted)
    for name, tensor in estimate.gradient.items():
        if name not in masters:
            problem = f"a gradient of {name!r}, which is not tuned"
        elif not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (masters[name].shape, torch.float32):
            problem = f"a gradient of {name!r} that is not float32 of shape {tuple(masters[name].shape)}"
        elif (tensor.device, tensor.layout) != (masters[name].device, torch.strided):
            problem = f"a gradient of {name!r} that is not a dense tensor on {masters[name].device}"
        else:
            continue
        raise broken_contract("model.estimator", estimator, f"estimate() returned {problem}", wanted)
    if estimate.finite and not estimate.gradient and context.tuned.names_of_step(context.seed, context.step):
        raise broken_contract("model.estimator", estimator, "estimate() returned no gradient for finite losses", wanted)
    return estimate


def _with_floats(estimate: Estimate) -> Estimate:
    """Return an estimate with Python's numbers in place of tensors and those of NumPy, which a checkpoint could not hold."""
    evaluations = estimate.num_evaluations
    return replace(
        estimate,
        loss=float(estimate.loss),
        loss_plus=float(estimate.loss_plus),
        loss_minus=float(estimate.loss_minus),
        projected_grad=tuple(map(float, estimate.projected_grad)),
        num_evaluations=evaluations if isinstance(evaluations, int) else float(evaluations),
        grad_norm=None if estimate.grad_norm is None else float(estimate.grad_norm),
    )


def check_has_matrices(tuned: TunedTensors, name: str) -> None:
    """Check that a matrix is tuned, as directions of low rank need; ``name`` is the estimator or option for the message.

    Raises:
        SlzoError: No matrix is tuned.
    """
    if all(master.dim() != 2 for master in tuned.masters):
        raise SlzoError(
            f"model.estimator {name}: low-rank directions need a complete matrix, and this scope tunes only single "
            "elements; use SPSA"
        )
