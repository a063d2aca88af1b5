"""How one of a model's tensors is tuned: all of it, some elements, or its part in a subspace.

A kind maps a float32 master to the model's own (live) tensor. Directions, gradients and optimizers live in the space of the
master; ``tangent`` and ``pull_back`` translate to and from the space of the live tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from slzo.models.peft_files import LowRank


class TunedTensor(nn.Module, ABC):
    """One tensor of the model, and the master that it is written from.

    Args:
        live: The model's tensor; it is overwritten in place.
        master: Initial value of the master, float32.
    """

    kind: ClassVar[str]

    def __init__(self, live: Tensor, master: Tensor) -> None:
        super().__init__()
        self._live = (live,)  # in a tuple, so that it is not registered as a parameter a second time
        # requires_grad is what optimizers and Lightning expect of a trained tensor; no graph is ever built
        self.master = nn.Parameter(master)

    @property
    def live(self) -> Tensor:
        """The model's tensor."""
        return self._live[0]

    def moved(self, direction: Tensor | None, scale: float) -> Tensor:
        """``master + scale * direction``, a new tensor unless there is no direction."""
        return self.master.detach() if direction is None else torch.add(self.master.detach(), direction, alpha=scale)

    @abstractmethod
    def write(self, direction: Tensor | None, scale: float) -> None:
        """Write ``master + scale * direction`` to the live tensor, rounded once to its dtype."""

    @abstractmethod
    def tangent(self, direction: Tensor) -> Tensor:
        """How the live tensor moves when the master moves along ``direction``; shape and dtype of the live tensor."""

    @abstractmethod
    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient by the master from that by the live tensor, float32: the transpose of :meth:`tangent`."""

    def applied(self, direction: Tensor, high: float, low: float) -> Tensor:
        """What rounding leaves of a direction.

        Returns:
            The difference of the live tensors at ``high`` and ``low`` along ``direction``, over ``high - low``, in the space of
            the master. In float32 it differs from ``direction`` by less than the noise of an estimate, and ``direction``
            itself is returned.
        """
        if self.live.dtype == torch.float32:
            return direction
        ends = [self._unrounded(self.moved(direction, s)).to(self.live.dtype).float() for s in (high, low)]
        return self._coordinates((ends[0] - ends[1]) / (high - low))

    def _unrounded(self, master: Tensor) -> Tensor:
        """The elements of the live tensor that a master stands for, before they are rounded."""
        return master

    def _coordinates(self, difference: Tensor) -> Tensor:
        """A difference of what :meth:`_unrounded` returns, in the space of the master."""
        return difference

    def constants(self) -> dict[str, Tensor]:
        """Tensors besides the master that the constructor takes, by argument; a checkpoint holds them."""
        return {}

    def low_rank(self) -> LowRank | None:
        """How it moved from its first value, as LoRA has it; ``None`` where that is of no low rank."""
        return None


class Whole(TunedTensor):
    """Every element of a tensor."""

    kind = "whole"

    def __init__(self, live: Tensor) -> None:
        super().__init__(live, live.detach().to(torch.float32, copy=True))

    def write(self, direction: Tensor | None, scale: float) -> None:
        if direction is not None and self.live.dtype == torch.float32:
            torch.add(self.master, direction, alpha=scale, out=self.live)
        else:
            self.live.copy_(self.moved(direction, scale))

    def tangent(self, direction: Tensor) -> Tensor:
        return direction.to(self.live.dtype)

    def pull_back(self, gradient: Tensor) -> Tensor:
        return gradient.float()


class Masked(TunedTensor):
    """Some elements of a tensor; the master holds only these.

    Args:
        live: The model's tensor, contiguous.
        index: Their places in the flattened tensor, shape (K,), int64 or int32, K >= 1.
    """

    kind = "masked"
    index: Tensor

    def __init__(self, live: Tensor, index: Tensor) -> None:
        if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1 or not index.numel():
            raise ValueError("its index is no list of places")
        if int(index.min()) < 0 or int(index.max()) >= live.numel():
            raise ValueError("its index points outside of the tensor")
        # 8 bytes an element would be more than the master itself takes
        index = index.to(live.device, torch.int32 if live.numel() < 2**31 else torch.int64)
        super().__init__(live, live.detach().view(-1)[index].to(torch.float32, copy=True))
        self.register_buffer("index", index, persistent=False)

    def write(self, direction: Tensor | None, scale: float) -> None:
        self.live.view(-1)[self.index] = self.moved(direction, scale).to(self.live.dtype)

    def tangent(self, direction: Tensor) -> Tensor:
        moved = torch.zeros_like(self.live)
        moved.view(-1)[self.index] = direction.to(moved.dtype)
        return moved

    def pull_back(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1)[self.index].float()

    def constants(self) -> dict[str, Tensor]:
        return {"index": self.index}


class Subspace(TunedTensor):
    """A matrix moves within a subspace of its inputs: W = W0 + C V^T, and C is tuned (ZO-Act, arXiv 2607.01125).

    Args:
        live: W, shape (out, in), or (in, out) if ``transposed``.
        basis: V, shape (in, r), orthonormal columns, float32.
        transposed: Whether the weight is stored as (in, out), as GPT-2 does.
    """

    kind = "subspace"
    basis: Tensor
    base: Tensor

    def __init__(self, live: Tensor, basis: Tensor, transposed: bool | Tensor = False) -> None:
        self.transposed = bool(transposed)
        if live.dim() != 2 or basis.dim() != 2 or basis.shape[0] != live.shape[1 - int(self.transposed)]:
            raise ValueError(f"its basis of shape {list(basis.shape)} does not fit")
        super().__init__(live, torch.zeros(live.shape[int(self.transposed)], basis.shape[1], device=live.device))
        self.register_buffer("basis", basis.to(live.device, torch.float32), persistent=False)
        self.register_buffer("base", live.detach().clone(), persistent=False)

    def write(self, direction: Tensor | None, scale: float) -> None:
        self.live.copy_(self._unrounded(self.moved(direction, scale)))

    def _unrounded(self, master: Tensor) -> Tensor:
        return self._full(master).add_(self.base)

    def _coordinates(self, difference: Tensor) -> Tensor:
        return self.pull_back(difference)  # what rounding adds outside of the subspace is left out

    def _full(self, coordinates: Tensor) -> Tensor:
        full = coordinates @ self.basis.T
        return full.T if self.transposed else full

    def tangent(self, direction: Tensor) -> Tensor:
        return self._full(direction).to(self.live.dtype).contiguous()

    def pull_back(self, gradient: Tensor) -> Tensor:
        return (gradient.float().T if self.transposed else gradient.float()) @ self.basis

    def constants(self) -> dict[str, Tensor]:
        return {"basis": self.basis, "transposed": torch.tensor(self.transposed)}

    def low_rank(self) -> LowRank:
        return LowRank(self.basis.T, self.master, transposed=self.transposed)


KINDS: Mapping[str, Callable[..., TunedTensor]] = {each.kind: each for each in (Whole, Masked, Subspace)}
"""Makes a tuned tensor of each kind from the model's tensor and :meth:`TunedTensor.constants`."""
