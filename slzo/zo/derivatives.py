"""Exact derivatives with respect to the masters of any module, by back-propagation."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slzo.batches.losses import LossSum
from slzo.utils.errors import SlzoError
from slzo.zo.tuned import TunedTensors

_Result = TypeVar("_Result")


def back_propagate(
    module: nn.Module, tuned: TunedTensors, function: Callable[[], LossSum]
) -> tuple[LossSum, dict[str, Tensor]]:
    """Compute a loss and its gradient by back-propagation.

    Args:
        module: The module that ``function`` runs. Its live tensors must equal the masters.
        tuned: Masters of some of its parameters.
        function: Returns the summed loss and its weight.

    Returns:
        What ``function`` returned, detached, and the gradient of the summed loss for each master, float32.
    """
    with torch.enable_grad():
        (total, weight), live = _call_with_views(module, tuned, function)
        gradients = torch.autograd.grad(total, live, allow_unused=True)
    return LossSum(total.detach(), weight.detach()), _pulled_back(tuned, gradients)


def vjp(
    module: nn.Module, tuned: TunedTensors, function: Callable[[], Tensor]
) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """Call a function, and return its result with the transpose of its derivative, as ``torch.func.vjp`` does.

    Args:
        module: The module that ``function`` runs. Its live tensors must equal the masters.
        tuned: Masters of some of its parameters.
        function: Returns a tensor that depends on them.

    Returns:
        The tensor, detached; and a function from the gradient with respect to it, of its shape and dtype, to the gradient of each
        master, float32. It can be called once.
    """
    with torch.enable_grad():
        output, live = _call_with_views(module, tuned, function)

    def pull_back(gradient: Tensor) -> dict[str, Tensor]:
        return _pulled_back(tuned, torch.autograd.grad(output, live, gradient, allow_unused=True))

    return output.detach(), pull_back


def _pulled_back(tuned: TunedTensors, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {
        # a tensor that the result does not depend on has no gradient
        name: torch.zeros_like(tensor.master) if gradient is None else tensor.pull_back(gradient)
        for (name, tensor), gradient in zip(tuned.items(), gradients, strict=True)
    }


def _call_with_views(
    module: nn.Module, tuned: TunedTensors, function: Callable[[], _Result]
) -> tuple[_Result, list[Tensor]]:
    """Call the function with views of the live tensors in their place that need a gradient; return its result and the views.

    Raises:
        SlzoError: A tuned tensor is not a parameter of the module.
    """
    paths = {id(parameter): name for name, parameter in module.named_parameters()}
    views: dict[str, Tensor] = {}
    for name, tensor in tuned.items():
        if id(tensor.live) not in paths:
            raise SlzoError(
                f"model.scope: tensor {name!r} is not a parameter of the model, so it has no gradient; use SPSA"
            )
        views[f"module.{paths[id(tensor.live)]}"] = tensor.live.detach().requires_grad_()
    return functional_call(_Call(module, function), views, ()), list(views.values())


class _Call(nn.Module):
    """Wraps a module and runs a function as its forward, so that ``functional_call`` can replace the module's tensors."""

    def __init__(self, module: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self) -> Any:
        return self._function()
