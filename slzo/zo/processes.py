"""What each of several processes evaluates of a step: its rows at all points, or its points on all rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slzo.errors import SlzoError
from slzo.zo.estimators.base import Loss, Point
from slzo.zo.tuned import Direction

AddUp = Callable[[Tensor], Tensor]
"""Adds tensors up over processes; each is given the sum."""

Divided = Literal["rows", "points"]


def _alone(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Processes:
    """The processes of a run, of which this is one.

    Attributes:
        number: How many.
        rank: Which of them this is, counted from 0.
        divided: ``rows``: each has rows of its own and evaluates every point on them. ``points``: all have the same rows, each
            evaluates some of the points, and only losses are exchanged, as in evolution strategies (arXiv 1703.03864).
        add_up: Over the processes.
    """

    number: int = 1
    rank: int = 0
    divided: Divided = "rows"
    add_up: AddUp = _alone

    @property
    def divide_points(self) -> bool:
        """Whether points are divided, over more than one process."""
        return self.divided == "points" and self.number > 1

    def loss(self, make: Callable[[AddUp], Loss], device: torch.device) -> Loss:
        """The loss over all processes, on a device; ``make`` gives that of this process's rows from what adds up."""
        return _DividedPoints(make(_alone), self, device) if self.divide_points else make(self.add_up)

    def queries_at_once(self, own: int) -> int:
        """Of a step, where this process evaluates so many together."""
        return own * self.number if self.divide_points else own


@dataclass(frozen=True)
class _DividedPoints(Loss):
    """Each process evaluates the points of its share and gets the others' losses from the others."""

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


_NO_POINTS = "data.processes_divide points: this model.estimator differentiates and has no points; use rows, or SPSA"
