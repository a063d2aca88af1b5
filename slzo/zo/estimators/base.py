"""What an estimator is given and what it returns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from slzo.zo.tuned import Direction, TunedTensors


class RowShare(NamedTuple):
    """A share of a batch's rows: the ``number``-th, counted from 0, of ``of`` shares of nearly the same size."""

    number: int = 0
    of: int = 1


class Point(NamedTuple):
    """A place to evaluate the loss, ``masters + scale * direction``, and the rows to evaluate it on."""

    direction: Direction
    scale: float
    rows: RowShare = RowShare()


@dataclass(frozen=True)
class LossReport:
    """What a loss has to say of its last evaluation besides its value.

    Attributes:
        values: Numbers to log, by name.
        problems: What failed, a line each; not empty where the loss is not finite for a known reason.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


class Loss(ABC):
    """The loss of one batch as a function of the masters, averaged over the rows of every process."""

    @abstractmethod
    def at(self, points: Sequence[Point]) -> Tensor:
        """Losses at several points, shape (P,), float32; forward passes only.

        The points' row shares have one ``of`` and come in turn, 0 to ``of - 1``, once or several times. The loss of a share is
        what it adds to the batch's, times ``of``: the mean over the shares is the batch's loss, whatever their sizes.
        """

    @abstractmethod
    def gradient(self) -> tuple[float, Direction]:
        """Loss and gradient at the masters, by back-propagation; the live weights must be at the masters."""

    @abstractmethod
    def slope(self, direction: Direction) -> tuple[float, float]:
        """Loss and its derivative along a direction at the masters, by forward-mode differentiation."""

    @property
    def report(self) -> LossReport:
        """What the last evaluation has to say besides the loss; most have nothing."""
        return LossReport()


@dataclass(frozen=True)
class Request:
    """One step's question.

    Attributes:
        tuned: Draws directions.
        loss: Evaluates the batch.
        seed: The run's seed.
        step: Training step; directions are drawn from (seed, step, query).
        eps: Size of the perturbation, absolute, > 0.
        num_queries: Directions, >= 1.
        queries_at_once: Directions drawn and evaluated together, so that small batches can be paired over several queries;
            each takes the memory of what is tuned.
    """

    tuned: TunedTensors
    loss: Loss
    seed: int
    step: int
    eps: float = 1e-3
    num_queries: int = 1
    queries_at_once: int = 1

    def queries_in_turn(self) -> Iterator[range]:
        """The queries, as many together as are evaluated together."""
        for start in range(0, self.num_queries, self.queries_at_once):
            yield range(start, min(start + self.queries_at_once, self.num_queries))


@dataclass(frozen=True)
class Estimate:
    """What one step learned.

    Attributes:
        loss: Loss at or around the present weights.
        loss_plus: Loss at ``w + eps z``, mean over queries.
        loss_minus: Loss at ``w - eps z``, mean over queries; that at ``w`` where an estimator evaluates one side only, or
            ``loss_plus`` where it does not evaluate there either.
        projected_grad: Slope of the loss along each direction.
        num_evaluations: Times that the batch was evaluated.
        gradient: By name of the tuned tensor, float32; empty if the estimate is not finite.
    """

    loss: float
    loss_plus: float
    loss_minus: float
    projected_grad: tuple[float, ...]
    num_evaluations: int
    gradient: Mapping[str, Tensor]

    @property
    def finite(self) -> bool:
        """Whether every loss was a number: neither infinite nor NaN."""
        return all(map(math.isfinite, (self.loss, self.loss_plus, self.loss_minus, *self.projected_grad)))

    def scale_gradient(self, factor: float) -> None:
        """Multiply the gradient in place; the slopes stay as they were found."""
        if factor != 1.0:
            for own in self.gradient.values():
                own.mul_(factor)


class Estimator(ABC):
    """Estimates the gradient at the masters; who calls it restores the live weights, which evaluations move.

    Attributes:
        differentiates: Whether it needs operations with derivatives; the model then runs without oneDNN.
        normalizes: Whether it divides the gradient by its size.
    """

    differentiates: bool = False
    normalizes: bool = False

    @abstractmethod
    def estimate(self, request: Request) -> Estimate:
        """One estimate; nothing of it stays behind in the estimator, nor in the masters."""

    def check(self, num_queries: int, batch_size: int | None = None) -> None:
        """Refuse settings that this kind cannot work with: directions and, if known, rows a step; most work with any.

        Raises:
            SlzoError: It cannot.
        """
        return

    @abstractmethod
    def evaluations(self, num_queries: int) -> float:
        """Forward passes of the whole batch that a step with so many directions takes; what costs more counts as more."""

    def directions_at_once(self, num_queries: int, queries_at_once: int) -> int:
        """How many directions a step holds at the same time."""
        return min(num_queries, queries_at_once)

    def describe(self) -> str:
        """In a few words, for the summary."""
        return type(self).__name__
