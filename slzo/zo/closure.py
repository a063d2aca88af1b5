"""A loss for the estimators, made from a closure that evaluates any torch module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slzo.utils.errors import SlzoError, short_repr
from slzo.zo.derivatives import vjp
from slzo.zo.loss import Loss
from slzo.zo.tuned import Gradient, Point, TunedTensors


@dataclass(frozen=True)
class ClosureLoss(Loss):
    """The loss of one batch on any ``torch.nn.Module``.

    Attributes:
        tuned: Masters of some of the module's parameters.
        closure: Evaluates the batch with the current weights and returns the mean loss, a 0-dimensional tensor. It must compute
            the same function at each call: no dropout, no running statistics.

    Raises:
        SlzoError: A tuned tensor is float64, so its master would round it, or is not of a floating-point type.
    """

    tuned: TunedTensors
    closure: Callable[[], Tensor]

    def __post_init__(self) -> None:
        for name, tensor in self.tuned.items():
            if tensor.live.dtype == torch.float64:
                raise SlzoError(f"tensor {name!r} is float64, and masters are float32; convert the module to float32")
            if not tensor.live.is_floating_point():
                raise SlzoError(f"tensor {name!r} is of {tensor.live.dtype}; tune tensors of floating-point types only")

    @torch.no_grad()
    def at(self, points: Sequence[Point]) -> Tensor:
        losses = []
        for point in points:
            self.tuned.write(point)
            losses.append(self._evaluate().float())
        return torch.stack(losses)

    def gradient(self) -> tuple[float, Gradient]:
        loss, vjp_fn = vjp(self.tuned, self._evaluate)
        gradient = vjp_fn(torch.ones_like(loss))
        if not gradient:
            raise SlzoError(
                "the loss depends on no tuned tensor, so there is no gradient; tune tensors that the closure uses"
            )
        return float(loss), self.tuned.with_zeros(gradient)

    def _evaluate(self) -> Tensor:
        value = self.closure()
        try:
            loss = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SlzoError(f"the closure returned {short_repr(value)}; return the mean loss, of shape ()") from error
        if loss.dim() > 0:
            raise SlzoError(
                f"the closure returned a tensor of shape {tuple(loss.shape)}; return the mean loss, of shape ()"
            )
        return loss
