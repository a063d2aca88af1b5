"""Exact derivatives with respect to the masters, by back-propagation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from slzo.zo.tuned import TunedTensors


def vjp(tuned: TunedTensors, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """Call a function, and return its result with the transpose of its derivative, as ``torch.func.vjp`` does.

    Args:
        tuned: Masters of some tensors of a model. The live tensors must equal the masters.
        function: Returns a tensor that depends on the live tensors.

    Returns:
        The tensor, detached; and a function from the gradient with respect to it, of its shape and dtype, to the gradients of the
        masters, float32, without those of unused tensors. It can be called once.
    """
    live = {name: tensor.live for name, tensor in tuned.items()}
    before = [tensor.requires_grad for tensor in live.values()]
    try:
        for tensor in live.values():
            tensor.requires_grad_()
        edges = [get_gradient_edge(tensor) for tensor in live.values()]
        with torch.enable_grad():
            output = function()
    finally:
        for tensor, requires_grad in zip(live.values(), before, strict=True):
            tensor.requires_grad_(requires_grad)

    def vjp_fn(gradient: Tensor) -> dict[str, Tensor]:
        if not output.requires_grad:  # it depends on no live tensor
            return {}
        gradients = torch.autograd.grad(output, edges, gradient, allow_unused=True)
        return tuned.to_master_gradient(
            {name: own for name, own in zip(live, gradients, strict=True) if own is not None}
        )

    return output.detach(), vjp_fn
