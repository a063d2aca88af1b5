"""The base class of estimators, what an estimator receives and what it returns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from slzo.utils.errors import SlzoError, broken_contract, check_at_least, shown
from slzo.zo.tuned import Direction, TunedTensors


class Point(NamedTuple):
    """A point ``masters + scale * direction`` at which the loss is evaluated."""

    direction: Direction
    scale: float


@dataclass(frozen=True)
class LossReport:
    """Additional results of the last evaluation of a loss.

    Attributes:
        values: Numbers to log, by name.
        problems: Failures, one line each. Not empty if the loss is not finite for a known reason.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


class LayerOutput(ABC):
    """What the tuned layer computes for some rows of a batch, at the P positions that predict an answer token.

    Attributes:
        keys: Number of each row in the training set, length B. It does not depend on the batch or the process.
        counts: Number of positions of each row, length B. They sum to P.
        term: Number of the term of the loss that each position is measured by, shape (P,), int64. The terms are the losses of
            the rows, M = B; or, if the loss is a sum over positions, those of the positions, M = P.
        per_token: Whether each position has a term of its own.
        size: Root mean square of what the layer adds to its input at each position, shape (P, 1), float32, > 0.
        width: Size of a hidden state.
        num_layers_above: Number of layers above the tuned one.
        shifts_all_tokens: Whether :meth:`token_shifts` has directions of all tokens that the loss depends on.
        whole_vocabulary: Whether each point needs logits of the whole vocabulary, which cost more than a layer.
        points_at_once: Number of points that :meth:`losses` can evaluate in about the memory of one forward pass of the batch.
    """

    keys: tuple[int, ...]
    counts: tuple[int, ...]
    term: Tensor
    per_token: bool
    size: Tensor
    width: int
    num_layers_above: int
    shifts_all_tokens: bool
    whole_vocabulary: bool
    points_at_once: int

    @property
    def num_terms(self) -> int:
        """Number of terms of the loss, M."""
        return sum(self.counts) if self.per_token else len(self.keys)

    @abstractmethod
    def losses(self, shifts: Tensor) -> Tensor:
        """Return the M terms of the total loss of the batch at N points, shape (N, M), float32.

        Args:
            shifts: What is added to the output, shape (N, P, width), float32.
        """

    def token_shifts(self, number: int, change: float) -> Tensor | None:
        """Return shifts that change the logits of the answers' tokens, and of the likeliest tokens of each position.

        Args:
            number: Number of likely tokens, if the loss needs the likelihood of tokens.
            change: By how much a difference of two logits changes, if the layers above pass the shift on unchanged.

        Returns:
            Shifts, shape (K, P, width), float32, orthogonal at each position, 0 where a position has fewer than K. ``None`` if
            they are not known, as by default.
        """
        return None

    @abstractmethod
    def applied(self, shifts: Tensor) -> Tensor:
        """Return by how much the output really changes, after rounding to the model's dtype; shape and dtype as ``shifts``."""


OutputEstimator = Callable[[LayerOutput], tuple[Tensor, int]]
"""Returns the gradient of the total loss with respect to a layer's output, shape (P, width), float32, and the number of points at
which the loss was evaluated for it."""


def rms(states: Tensor) -> Tensor:
    """Return the root mean square of each state, shape (P, 1), of states of shape (P, width)."""
    return states.square().mean(dim=1, keepdim=True).sqrt()


class OutputGradient(NamedTuple):
    """Result of :meth:`Loss.gradient_from_output`.

    Attributes:
        loss: Loss at the masters.
        gradient: Gradient by name of the tuned tensor.
        evaluations: Cost as a number of forward passes of the batch through the tuned layer and all above. In the last layer of
            the model these run for the last tokens of each sequence only, see :mod:`slzo.models.logits`.
    """

    loss: float
    gradient: Direction
    evaluations: float


class Loss(ABC):
    """The loss of one batch as a function of the masters, averaged over the rows of every process."""

    @abstractmethod
    def at(self, points: Sequence[Point]) -> Tensor:
        """Return the losses at P points, shape (P,), float32, from forward passes alone."""

    def gradient(self) -> tuple[float, Direction]:
        """Return loss and gradient at the masters, by back-propagation. The live weights must equal the masters.

        Raises:
            SlzoError: The loss has only values. By default always.
        """
        raise SlzoError(f"model.estimator: {type(self).__name__} has no gradient; use SPSA")

    def gradient_from_output(self, estimate: OutputEstimator) -> OutputGradient:
        """Return the loss at the masters, and the gradient that follows from an estimate at the tuned layer's output.

        Only the tuned layer is differentiated. At positions that predict no answer token its output is treated as constant. The
        live weights must equal the masters.

        Args:
            estimate: Estimates the gradient at the output. It is called for each part of the batch that runs in one forward
                pass.

        Raises:
            SlzoError: The loss is not a sum over rows. By default always.
        """
        raise SlzoError(
            f"model.estimator: {type(self).__name__} is not a sum over rows of a loss of logits, so a layer's output cannot be "
            "perturbed; use SPSA"
        )

    @property
    def report(self) -> LossReport:
        """Additional results of the last evaluation; empty by default."""
        return LossReport()


@dataclass(frozen=True)
class Request:
    """What an estimator needs for one step.

    Attributes:
        tuned: The tuned tensors, which draw the directions.
        loss: The loss of the batch.
        seed: Seed of the run.
        step: Training step. Directions are drawn from (seed, step, query).
        eps: Absolute size of the perturbation, > 0.
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

    def queries_in_turn(self) -> Iterator[range]:
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
    gradient: Mapping[str, Tensor]
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


class Estimator(ABC):
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
            raise TypeError(f"{cls.__qualname__}.perturbs is {shown(cls.perturbs)}; choose 'weights', 'output' or None")

    @abstractmethod
    def estimate(self, request: Request) -> Estimate:
        """Estimate the gradient. Neither the estimator nor the masters keep any state of it."""

    def check(self, num_queries: int) -> None:
        """Check that the estimator can work with a number of directions.

        Raises:
            SlzoError: The estimator cannot work with this number. By default every number is accepted.
        """
        return

    @abstractmethod
    def evaluations(self, num_queries: int) -> float:
        """Return the cost of a step with ``num_queries`` directions, as a number of forward passes of the whole batch."""

    def describe(self) -> str:
        """Describe the estimator in a few words, for the summary."""
        return type(self).__name__


def estimate_from_gradient(loss: float, gradient: Mapping[str, Tensor], evaluations: float) -> Estimate:
    """Return the estimate of an estimator that perturbs no weights, from the loss at the masters."""
    return Estimate(loss, loss, loss, (), evaluations, gradient, grad_norm=float(get_total_norm(gradient.values())))


def estimate_of(estimator: Estimator, request: Request) -> Estimate:
    """Return the estimate of a step.

    Raises:
        SlzoError: The estimator cannot work with this number of directions, or does not return an estimate for the tuned tensors.
    """
    estimator.check(request.num_queries)
    estimate, masters = estimator.estimate(request), request.tuned.named_masters()
    wanted = "an Estimate with numbers, and a float32 gradient by name of the tuned tensor"
    if not isinstance(estimate, Estimate):
        raise broken_contract("model.estimator", estimator, f"estimate() returned {shown(estimate)}", wanted)
    if estimator.perturbs == "weights" and not estimate.projected_grad:
        raise broken_contract("model.estimator", estimator, "estimate() returned no projected_grad", wanted)
    if estimator.perturbs != "weights" and estimate.grad_norm is None:
        raise broken_contract("model.estimator", estimator, "estimate() returned no grad_norm", wanted)
    for name, tensor in estimate.gradient.items():
        if name not in masters:
            problem = f"a gradient of {name!r}, which is not tuned"
        elif not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (masters[name].shape, torch.float32):
            problem = f"a gradient of {name!r} that is not float32 of shape {tuple(masters[name].shape)}"
        else:
            continue
        raise broken_contract("model.estimator", estimator, f"estimate() returned {problem}", wanted)
    if estimate.finite and not estimate.gradient and request.tuned.names_of_step(request.seed, request.step):
        raise broken_contract("model.estimator", estimator, "estimate() returned no gradient for finite losses", wanted)
    return estimate


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
