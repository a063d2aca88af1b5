"""Exact derivatives of a loss by the masters, for any module: back-propagation and forward mode."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from slzo.utils.errors import SlzoError
from slzo.zo.tuned import Direction, TunedTensors

Sums = tuple[Tensor, Tensor]
"""A loss summed over some rows, and what to divide it by, both 0-dimensional."""


def back_propagate(
    module: nn.Module, tuned: TunedTensors, function: Callable[[], Sums]
) -> tuple[Sums, dict[str, Tensor]]:
    """The value, without a graph, of a function that runs a module, and the gradient of its first part by each master, float32.

    The module's live tensors must be at the masters.
    """
    live = {name: tensor.live.detach().requires_grad_() for name, tensor in tuned.items()}
    with torch.enable_grad():
        total, weight = _call_with(module, tuned, live, function)
        gradients = torch.autograd.grad(total, list(live.values()), allow_unused=True)
    pulled = {
        # a layer norm of a layer that feeds nothing, say, has no gradient
        name: torch.zeros_like(tensor.master) if gradient is None else tensor.pull_back(gradient)
        for (name, tensor), gradient in zip(tuned.items(), gradients, strict=True)
    }
    return (total.detach(), weight.detach()), pulled


def forward_derivative(
    module: nn.Module, tuned: TunedTensors, direction: Direction, function: Callable[[], Sums]
) -> tuple[Tensor, Tensor, Tensor]:
    """First part of the value of a function that runs a module, its derivative along a direction, and the second part.

    The module's live tensors must be at the masters.

    Raises:
        SlzoError: The module has an operation without a forward derivative.
    """
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        live = {
            name: forward_ad.make_dual(tensor.live.detach(), tensor.tangent(direction[name]))
            for name, tensor in tuned.items()
            if name in direction
        }
        try:
            total, weight = _call_with(module, tuned, live, function)
        except (NotImplementedError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise SlzoError(
                f"model.estimator ForwardGradient: this model cannot be differentiated in forward mode ({reason}); "
                "use SPSA, which needs loss values only"
            ) from error
        primal, tangent = forward_ad.unpack_dual(total)
        return primal, torch.zeros_like(primal) if tangent is None else tangent, weight


def _call_with(
    module: nn.Module, tuned: TunedTensors, live: Mapping[str, Tensor], function: Callable[[], Sums]
) -> Sums:
    """The function's value with other tensors in the place of the live ones; only for the time of the call."""
    paths = {id(parameter): name for name, parameter in module.named_parameters()}
    tensors = {f"module.{paths[id(tensor.live)]}": live[name] for name, tensor in tuned.items() if name in live}
    return functional_call(_Call(module, function), tensors, ())


class _Call(nn.Module):
    """Calls a function as the forward of a module around another, so that ``functional_call`` can exchange its tensors."""

    def __init__(self, module: nn.Module, function: Callable[[], Sums]) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self) -> Sums:
        return self._function()
