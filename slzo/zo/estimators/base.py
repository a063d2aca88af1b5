"""What an estimator is given and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from slzo.errors import SlzoError
from slzo.zo.tuned import Direction, TunedTensors


class Share(NamedTuple):
    """A part of a batch: the ``number``-th, counted from 0, of ``of`` parts of nearly the same number of rows."""

    number: int = 0
    of: int = 1


WHOLE = Share()


class Point(NamedTuple):
    """A place to evaluate the loss, ``masters + scale * direction``, and the rows to evaluate it on."""

    direction: Direction
    scale: float
    share: Share = WHOLE


class Loss(Protocol):
    """The loss of one batch as a function of the masters, averaged over the rows of every process."""

    def at(self, points: Sequence[Point]) -> Tensor:
        """Losses at several points, shape (P,), float32; forward passes only.

        Shares have one ``of`` and come in turn, 0 to ``of - 1``, once or several times. The loss of a share is what it adds to
        the batch's, times ``of``: the mean over the shares is the batch's loss, whatever their sizes.
        """

    def gradient(self) -> tuple[float, Direction]:
        """Loss and gradient at the masters, by back-propagation; the live weights must be at the masters."""

    def slope(self, direction: Direction) -> tuple[float, float]:
        """Loss and its derivative along a direction at the masters, by forward-mode differentiation."""


@dataclass(frozen=True)
class Request:
    """One step's question.

    Attributes:
        tuned: Draws directions and takes the gradients.
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

    def query_groups(self) -> Iterator[range]:
        """The queries, as many together as are evaluated together."""
        for start in range(0, self.num_queries, self.queries_at_once):
            yield range(start, min(start + self.queries_at_once, self.num_queries))


@dataclass(frozen=True)
class Estimate:
    """What one step learned.

    Attributes:
        loss: Loss at or around the present weights.
        loss_plus: Loss at ``w + eps z``, mean over queries.
        loss_minus: Loss at ``w - eps z``, mean over queries; that at ``w`` where an estimator evaluates one side only.
        projected_grad: Slope of the loss along each direction.
        num_evaluations: Times that the batch was evaluated.
        finite: ``False`` if any loss was infinite or NaN; the gradients are then not set.
    """

    loss: float
    loss_plus: float
    loss_minus: float
    projected_grad: tuple[float, ...]
    num_evaluations: int
    finite: bool


class Estimator(ABC):
    """Fills the masters' gradients and leaves the live weights wherever the last evaluation put them.

    Attributes:
        differentiates: Whether it needs operations with derivatives; the model then runs without oneDNN.
    """

    differentiates: bool = False

    @abstractmethod
    def estimate(self, request: Request) -> Estimate:
        """Estimate the gradient at the masters."""

    def check(self, num_queries: int, batch_size: int | None = None) -> None:
        """Refuse settings that this kind cannot work with.

        Args:
            num_queries: Directions a step.
            batch_size: Rows a step, if known.

        Raises:
            SlzoError: It cannot.
        """
        return  # most kinds work with any

    def directions_at_once(self, num_queries: int, queries_at_once: int) -> int:
        """How many directions a step holds at the same time."""
        return min(num_queries, queries_at_once)

    def describe(self) -> str:
        """In a few words, for the summary."""
        return type(self).__name__


def check_settings(eps: float, num_queries: int, queries_at_once: int) -> None:
    """Refuse settings that no estimator can work with.

    Raises:
        SlzoError: One is out of range.
    """
    if not 0 < eps < float("inf"):
        raise SlzoError(f"model.eps {eps}: the perturbation must be a number above 0; 1e-3 is a good start")
    if num_queries < 1:
        raise SlzoError(f"model.num_queries {num_queries}: at least 1 direction per step is needed")
    if queries_at_once < 1:
        raise SlzoError(f"model.queries_at_once {queries_at_once}: must be at least 1")
