"""A loss for the estimators, made from any torch module and a closure that evaluates it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slzo.zo.derivatives import vjp
from slzo.zo.estimators.base import Loss, Point
from slzo.zo.tuned import Direction, TunedTensors


@dataclass(frozen=True)
class ClosureLoss(Loss):
    """The loss of one batch on any ``torch.nn.Module``.

    Attributes:
        module: The module to tune. It must compute the same function at each call: no dropout, no running statistics.
        tuned: Masters of some of its parameters.
        closure: Evaluates the batch with the current weights and returns the mean loss, a 0-dimensional tensor.
    """

    module: nn.Module
    tuned: TunedTensors
    closure: Callable[[], Tensor]

    @torch.no_grad()
    def at(self, points: Sequence[Point]) -> Tensor:
        losses = []
        for point in points:
            self.tuned.write(point.direction, point.scale)
            losses.append(torch.as_tensor(self.closure()).float())
        return torch.stack(losses)

    def gradient(self) -> tuple[float, Direction]:
        loss, pull_back = vjp(self.module, self.tuned, self.closure)
        gradient = pull_back(torch.ones_like(loss))
        return float(loss), gradient
