"""Exact derivatives with respect to the masters of any module, by back-propagation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slzo.utils.errors import SlzoError
from slzo.zo.tuned import TunedTensors


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

    Raises:
        SlzoError: A tuned tensor is not a parameter of the module.
    """
    output, pull_back = live_vjp(module, tuned, lambda _: function())
    return output, lambda gradient: tuned.with_zeros(tuned.pull_back(pull_back(gradient)))


def live_vjp(
    module: nn.Module, tuned: TunedTensors, function: Callable[[Mapping[str, Tensor]], Tensor]
) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """Like :func:`vjp`, but the second function returns the gradients of the live tensors, without those of unused ones.

    ``function`` gets the tensors by name of the tuned tensor that the module has instead of its own during the call.
    """
    paths = {id(parameter): name for name, parameter in module.named_parameters()}
    views: dict[str, Tensor] = {}
    for name, tensor in tuned.items():
        if id(tensor.live) not in paths:
            raise SlzoError(
                f"model.scope: tensor {name!r} is not a parameter of the model, so it has no gradient; use SPSA"
            )
        views[name] = tensor.live.detach().requires_grad_()
    in_call = {f"module.{paths[id(tensor.live)]}": views[name] for name, tensor in tuned.items()}
    with torch.enable_grad():
        output = functional_call(_Call(module, lambda: function(views)), in_call, ())

    def pull_back(gradient: Tensor) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(output, list(views.values()), gradient, allow_unused=True)
        return {name: own for name, own in zip(views, gradients, strict=True) if own is not None}

    return output.detach(), pull_back


class _Call(nn.Module):
    """Wraps a module and runs a function as its forward, so that ``functional_call`` can replace the module's tensors."""

    def __init__(self, module: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self) -> Any:
        return self._function()
