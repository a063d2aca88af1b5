"""What each of several processes evaluates of a step: its rows at all points, or some points on all rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Loss, LossReport, Point
from slzo.zo.tuned import Direction

AddUp = Callable[[Tensor], Tensor]
"""Adds tensors up over processes; each is given the sum."""

Parallel = Literal["rows", "directions"]


def identity(values: Tensor) -> Tensor:
    """The values of one process are their own sum."""
    return values


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Processes:
    """The processes of a run, of which this is one.

    Attributes:
        number: How many.
        rank: Which of them this is, counted from 0.
        parallel: ``rows``: each process has its own rows and evaluates every point on them. ``directions``: all have the same
            rows, each evaluates some of the points, and only losses are exchanged, as in evolution strategies (arXiv 1703.03864).
        add_up: Adds a tensor up over the processes.
        broadcast: Gives every process the value of the first one.
    """

    number: int = 1
    rank: int = 0
    parallel: Parallel = "rows"
    add_up: AddUp = identity
    broadcast: Callable[[Any], Any] = _same

    @property
    def divide_directions(self) -> bool:
        """Whether directions are divided, over more than one process."""
        return self.parallel == "directions" and self.number > 1

    @property
    def of_rows(self) -> tuple[int, int]:
        """Rank and number of the processes that training rows are divided over."""
        return (self.rank, self.number) if self.parallel == "rows" else (0, 1)

    def queries_at_once(self, own: int) -> int:
        """Queries that all processes evaluate together, where this one evaluates ``own``."""
        return own * self.number if self.divide_directions else own


ALONE = Processes()
"""One process."""


@dataclass(frozen=True)
class DividedDirections(Loss):
    """Each process evaluates its share of the points and gets the other losses from the other processes.

    Attributes:
        loss: That of all rows.
        processes: That share the points.
        device: Where losses are exchanged.
    """

    loss: Loss
    processes: Processes
    device: torch.device

    def at(self, points: Sequence[Point]) -> Tensor:
        number, rank = self.processes.number, self.processes.rank
        shares = points[0].rows.of  # points that share the rows out stay together
        copies = len(points) // shares
        first, stop = (copies * place // number * shares for place in (rank, rank + 1))
        losses = torch.zeros(len(points), device=self.device)
        if first < stop:
            losses[first:stop] = self.loss.at(points[first:stop])
        return self.processes.add_up(losses)  # one loss and zeros: exact

    def gradient(self) -> tuple[float, Direction]:
        raise SlzoError(_NO_POINTS)

    def slope(self, direction: Direction) -> tuple[float, float]:
        raise SlzoError(_NO_POINTS)

    @property
    def report(self) -> LossReport:
        """That of this process's share."""
        return self.loss.report


_NO_POINTS = "model.parallel directions: this model.estimator differentiates and has no points; use rows, or SPSA"
