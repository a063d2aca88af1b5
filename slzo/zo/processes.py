"""Division of a step's evaluations over processes: each evaluates its rows at all points, or some points on all rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from slzo.utils.errors import SlzoError
from slzo.zo.layer_output import LayerOutput, OutputEstimator
from slzo.zo.loss import Loss, OutputGradient
from slzo.zo.tuned import Point

# Many small sums take up to three times as long as one large sum.
_BUCKET_BYTES = 32 << 20

Parallel = Literal["rows", "directions"] | int
"""What is divided over processes: rows, directions, or both, with this number of processes for the directions of a step."""


def identity(value: Any) -> Any:
    """Return the value. This is the sum and the broadcast of a single process."""
    return value


def gathered_alone(tensor: Tensor) -> Tensor:
    """Return the tensor with a first dimension of size 1. This is what a single process gathers."""
    return tensor[None]


def sum_tensors(sum_over: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of each tensor over the processes.

    Tensors are exchanged in buckets of one dtype and up to 32 MiB; a larger one is exchanged alone, without a copy
    if it is contiguous.

    Args:
        sum_over: Returns the sum of a tensor over the processes; ``identity`` for a single process.
        tensors: Tensors of one device. Those of a dtype follow each other.
    """
    if sum_over is identity:
        return list(tensors)
    buckets: list[list[Tensor]] = []
    free = 0
    for tensor in tensors:
        if not buckets or tensor.nbytes > free or tensor.dtype != buckets[-1][0].dtype:
            buckets.append([])
            free = _BUCKET_BYTES
        buckets[-1].append(tensor)
        free -= tensor.nbytes
    return [tensor for bucket in buckets for tensor in _sum_bucket(sum_over, bucket)]


def _sum_bucket(sum_over: Callable[[Tensor], Tensor], bucket: list[Tensor]) -> list[Tensor]:
    if len(bucket) == 1:
        return [sum_over(bucket[0].contiguous())]
    summed = sum_over(torch.cat([tensor.flatten() for tensor in bucket]))
    parts = summed.split([tensor.numel() for tensor in bucket])
    return [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]


def gather_tensors(
    gather: Callable[[Tensor], Tensor], own: Sequence[Tensor], lengths: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """Return for each tensor those of all processes, which are sent together.

    Args:
        gather: Returns the tensors of all processes, stacked, if they have one shape.
        own: The tensors of this process. Those of the others may differ from them in the first dimension.
        lengths: The first dimension of each tensor, for each process.
    """
    row_bytes = [tensor.shape[1:].numel() * tensor.dtype.itemsize for tensor in own]
    sizes = [[length * size for length, size in zip(each, row_bytes, strict=True)] for each in lengths]
    sent = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in own])
    padding = sent.new_zeros(max(map(sum, sizes)) - len(sent))
    received = gather(torch.cat([sent, padding]))
    by_process = [joined[: sum(each)].split(each) for joined, each in zip(received, sizes, strict=True)]
    return [
        # a copy begins at an address that suits the dtype
        [part.clone().view(tensor.dtype).view(-1, *tensor.shape[1:]) for part in parts]
        for tensor, parts in zip(own, zip(*by_process, strict=True), strict=True)
    ]


class Partition(NamedTuple):
    """The part of a step's rows or points that one process has.

    Attributes:
        rank: Index of the part, counted from 0.
        total: Number of parts.
    """

    rank: int
    total: int


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as seen from one of them: a grid of rows by directions.

    Process r * directions + d has part r of the rows, and evaluates part d of the points on them. Processes with the same
    rows exchange only losses, as in evolution strategies (arXiv 1703.03864).

    Attributes:
        world_size: Number of processes.
        rank: Rank of this process, counted from 0.
        directions: Number of processes that have the same rows and divide the points of a step; a divisor of ``world_size``.
        sum_rows: Returns the sum of a tensor over the processes with different rows and the same points (all-reduce). May
            overwrite its argument, as the next one.
        sum_points: Returns the sum of a tensor over the processes with the same rows and different points (all-reduce).
        broadcast: Returns the value of the first process.
        gather_rows: Returns the tensors of the processes with different rows and the same points, stacked in the order of
            their rows (all-gather). They must have one shape.
    """

    world_size: int = 1
    rank: int = 0
    directions: int = 1
    sum_rows: Callable[[Tensor], Tensor] = identity
    sum_points: Callable[[Tensor], Tensor] = identity
    broadcast: Callable[[Any], Any] = identity
    gather_rows: Callable[[Tensor], Tensor] = gathered_alone

    @property
    def row_partition(self) -> Partition:
        """The part of the rows that this process has."""
        return Partition(self.rank // self.directions, self.world_size // self.directions)

    @property
    def point_partition(self) -> Partition:
        """The part of the points that this process evaluates."""
        return Partition(self.rank % self.directions, self.directions)


def num_directions(parallel: Parallel, world_size: int) -> int:
    """Return how many of ``world_size`` processes divide the points of a step.

    Raises:
        SlzoError: ``world_size`` is not a multiple of the given number.
    """
    if parallel == "rows":
        return 1
    if parallel == "directions":
        return world_size
    if world_size % parallel:
        raise SlzoError(
            f"model.parallel {parallel}: does not divide the {world_size} processes of this run; give a divisor of {world_size}, "
            "rows or directions"
        )
    return parallel


@dataclass
class CountedExchange:
    """A sum or a gathering over processes, which counts the bytes that each of them gives to it.

    Attributes:
        exchange: See :class:`Processes`.
        num_bytes: Bytes so far.
    """

    exchange: Callable[[Tensor], Tensor]
    num_bytes: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return what the processes exchange."""
        self.num_bytes += tensor.nbytes
        return self.exchange(tensor)


SINGLE_PROCESS = Processes()
"""The only process of a run."""


@dataclass(frozen=True)
class DividedDirections(Loss):
    """A loss whose points are divided over processes, which exchange the results.

    Attributes:
        loss: The loss of all rows, of which this process may have a share.
        processes: The processes that divide the points.
        device: Device on which the losses are exchanged.
    """

    loss: Loss
    processes: Processes
    device: torch.device

    def at(self, points: Sequence[Point]) -> Tensor:
        own = _own_points(len(points), self.processes)
        losses = torch.zeros(len(points), device=self.device)
        if own.start < own.stop:
            losses[own] = self.loss.at(points[own])
        return self.processes.sum_points(losses)  # exact: each entry is the sum of one loss and zeros

    def gradient_from_output(self, estimate: OutputEstimator) -> OutputGradient:
        found = self.loss.gradient_from_output(lambda output: estimate(_DividedOutput(output, self.processes)))
        if self.processes.row_partition.total == 1 and self.device.type == "cpu":
            return found
        # Processes with different points add up the rows in sums of their own, which may round differently, and on a GPU two
        # backward passes may do so too.
        own = [torch.tensor([found.loss], device=self.device), *found.gradient.values()]
        if self.processes.point_partition.rank > 0:  # those of the process with the first points count
            own = [torch.zeros_like(tensor) for tensor in own]
        loss, *gradient = sum_tensors(self.processes.sum_points, own)
        return found._replace(loss=loss.item(), gradient=dict(zip(found.gradient, gradient, strict=True)))


def _own_points(points: int, processes: Processes) -> slice:
    """Return which points this process evaluates; the first process always has some, so that it can report them."""
    rank, total = processes.point_partition
    return slice(-(-points * rank // total), -(-points * (rank + 1) // total))


class _DividedOutput(LayerOutput):
    """The output of a layer whose points are divided over processes, which exchange N times M losses."""

    def __init__(self, output: LayerOutput, processes: Processes) -> None:
        self._output, self._processes = output, processes
        self.points_at_once = output.points_at_once * processes.directions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)

    def losses(self, shifts: Tensor) -> Tensor:
        own = _own_points(len(shifts), self._processes)
        losses = shifts.new_zeros(len(shifts), self.num_terms)
        if own.start < own.stop:
            losses[own] = self._output.losses(shifts[own])
        return self._processes.sum_points(losses)

    def token_shifts(self, number: int, change: float) -> Tensor | None:
        return self._output.token_shifts(number, change)

    def applied(self, shifts: Tensor) -> Tensor:
        return self._output.applied(shifts)
