"""Parts of torch for modules, schedulers and oneDNN that have no public names."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def copy_modules(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Copy a module tree that shares its parameters, buffers and configuration; ``copy.deepcopy`` shares none of them.

    ``replace`` returns the replacement of a module, or ``None`` to copy it.
    """
    if (replacement := replace(module)) is not None:
        return replacement
    clone = copy.copy(module)
    clone._modules = {
        name: None if child is None else copy_modules(child, replace) for name, child in module._modules.items()
    }
    return clone


def with_submodule(root: _Module, path: str, submodule: nn.Module) -> _Module:
    """Copy ``root`` with another module at ``path``; everything else is shared."""
    clone = copy.copy(root)
    head, _, rest = path.partition(".")
    inner = with_submodule(root.get_submodule(head), rest, submodule) if rest else submodule
    clone._modules = {**root._modules, head: inner}
    return clone


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear map on the CPU through oneDNN; ``F.linear`` chooses the library itself.

    Args:
        inputs: float32, shape (..., in_features).
        weight: float32, shape (out_features, in_features).
        bias: float32, shape (out_features,), or ``None``.
    """
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def has_onednn_linear() -> bool:
    """Return whether this build of torch has what :func:`onednn_linear` calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def nested_schedulers(scheduler: Any) -> list[Any]:
    """Return a learning-rate scheduler and those that it combines, such as ``SequentialLR`` and ``ChainedScheduler`` do."""
    return [scheduler, *(one for inner in getattr(scheduler, "_schedulers", ()) for one in nested_schedulers(inner))]
