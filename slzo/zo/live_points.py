"""Live weights that change between a few points again and again, as generating answers at all of them token by token needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from slzo.zo.estimators.base import Point
from slzo.zo.tuned import TunedTensors


@contextmanager
@torch.no_grad()
def live_points(tuned: TunedTensors, points: Sequence[Point]) -> Iterator[Callable[[int], None]]:
    """Gives a function that makes a point's weights the live ones, by its number in ``points``.

    Copies of the weights are held where they take no more than ``tuned.hold_bytes``, and a change is one of addresses; else
    each change writes. Afterwards the live weights are in their own place, at one of the points.
    """
    names = {name for point in points for name in point.direction}
    live = {name: tensor.live for name, tensor in tuned.items() if name in names}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in live.values())
    if len(points) * num_bytes > tuned.hold_bytes:
        yield lambda number: _write(tuned, points[number])
        return
    own = {name: tensor.data for name, tensor in live.items()}
    copies: list[dict[str, Tensor]] = []
    for point in points[:-1]:
        _write(tuned, point)
        copies.append({name: tensor.data.clone() for name, tensor in live.items()})
    _write(tuned, points[-1])
    copies.append(own)

    def change(number: int) -> None:
        for name, tensor in live.items():
            tensor.data = copies[number][name]

    try:
        yield change
    finally:
        change(len(points) - 1)


def _write(tuned: TunedTensors, point: Point) -> None:
    if point.direction:
        tuned.write(point.direction, point.scale)
    else:  # the masters themselves: what an earlier point moved goes back
        tuned.restore()
