"""Division of a step's evaluations over processes: each evaluates its rows at all points, or some points on all rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import LayerOutput, Loss, LossReport, OutputGradient, Point, Positions
from slzo.zo.tuned import Direction

Parallel = Literal["rows", "directions"]


def identity(value: Any) -> Any:
    """Return the value. This is the sum and the broadcast of a single process."""
    return value


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as seen from one of them.

    Attributes:
        number: Number of processes.
        rank: Rank of this process, counted from 0.
        parallel: ``rows``: each process has its own rows and evaluates every point on them. ``directions``: all processes have
            the same rows, and each evaluates some of the points. Then only losses are exchanged, as in evolution strategies
            (arXiv 1703.03864).
        all_reduce_sum: Returns the sum of a tensor over the processes (all-reduce).
        broadcast: Returns the value of the first process.
    """

    number: int = 1
    rank: int = 0
    parallel: Parallel = "rows"
    all_reduce_sum: Callable[[Tensor], Tensor] = identity
    broadcast: Callable[[Any], Any] = identity

    @property
    def divide_directions(self) -> bool:
        """Whether the directions of a step are divided over several processes."""
        return self.parallel == "directions" and self.number > 1

    @property
    def of_rows(self) -> tuple[int, int]:
        """Rank and number of the processes that the training rows are divided over."""
        return (self.rank, self.number) if self.parallel == "rows" else (0, 1)

    def queries_at_once(self, own: int) -> int:
        """Return how many queries all processes evaluate together when each of them evaluates ``own``."""
        return own * self.number if self.divide_directions else own


@dataclass
class CountedSum:
    """The sum over the processes, which counts the bytes that each of them sends.

    Attributes:
        all_reduce_sum: See :class:`Processes`.
        num_bytes: Bytes so far.
    """

    all_reduce_sum: Callable[[Tensor], Tensor]
    num_bytes: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        self.num_bytes += tensor.numel() * tensor.element_size()
        return self.all_reduce_sum(tensor)


ALONE = Processes()
"""The only process of a run."""


@dataclass(frozen=True)
class DividedDirections(Loss):
    """A loss whose points are divided over processes, which exchange the results.

    Attributes:
        loss: The loss of all rows, on this process.
        processes: The processes that divide the points.
        device: Device on which the losses are exchanged.
    """

    loss: Loss
    processes: Processes
    device: torch.device

    def at(self, points: Sequence[Point]) -> Tensor:
        number, rank = self.processes.number, self.processes.rank
        shares = points[0].rows.of  # the points that divide one batch stay on one process
        copies = len(points) // shares
        first, stop = (copies * process // number * shares for process in (rank, rank + 1))
        losses = torch.zeros(len(points), device=self.device)
        if first < stop:
            losses[first:stop] = self.loss.at(points[first:stop])
        return self.processes.all_reduce_sum(losses)  # exact: each entry is the sum of one loss and zeros

    def gradient(self) -> tuple[float, Direction]:
        raise SlzoError(_NO_POINTS)

    def slope(self, direction: Direction) -> tuple[float, float]:
        raise SlzoError(_NO_POINTS)

    def gradient_from_output(self, estimate: Callable[[LayerOutput], Tensor], positions: Positions) -> OutputGradient:
        def divided(output: LayerOutput) -> Tensor:
            return estimate(_DividedOutput(output, self.processes))

        return self.loss.gradient_from_output(divided, positions)

    @property
    def report(self) -> LossReport:
        """The report of the points that this process evaluated last."""
        return self.loss.report


class _DividedOutput(LayerOutput):
    """The output of a layer whose points are divided over processes, which exchange N times M losses."""

    def __init__(self, output: LayerOutput, processes: Processes) -> None:
        self.keys, self.row, self.size, self.width = output.keys, output.row, output.size, output.width
        self.part, self.num_parts, self.by_position = output.part, output.num_parts, output.by_position
        self.whole_vocabulary = output.whole_vocabulary
        self.points_at_once = output.points_at_once * processes.number
        self._output, self._processes = output, processes

    def losses(self, shifts: Tensor) -> Tensor:
        rank, number = self._processes.rank, self._processes.number
        first, stop = (len(shifts) * process // number for process in (rank, rank + 1))
        losses = shifts.new_zeros(len(shifts), self.num_parts)
        if first < stop:
            losses[first:stop] = self._output.losses(shifts[first:stop])
        return self._processes.all_reduce_sum(losses)

    def applied(self, shifts: Tensor) -> Tensor:
        return self._output.applied(shifts)


_NO_POINTS = (
    "model.parallel directions: this model.estimator differentiates and has no points to divide; use rows, or SPSA"
)
