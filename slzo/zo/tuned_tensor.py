"""The ways to tune one of a model's tensors: all of its elements, some of them, or a low-rank subspace.

Each class maps a float32 master to the model's own (live) tensor. Directions, gradients and optimizer states have the shape of
the master.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from slzo.models.peft_files import LowRank


class TunedTensor(nn.Module, ABC):
    """A tensor of the model and its float32 master.

    Args:
        live: The model's tensor. It is overwritten in place.
        master: Initial value of the master, float32.
    """

    kind: ClassVar[str]

    def __init__(self, live: Tensor, master: Tensor) -> None:
        super().__init__()
        self._live = (live,)  # in a tuple, so that it is not registered as a parameter a second time
        # optimizers and Lightning expect requires_grad of a trained tensor; no graph is ever built
        self.master = nn.Parameter(master.contiguous())

    @property
    def live(self) -> Tensor:
        """The model's tensor."""
        return self._live[0]

    def moved(self, direction: Tensor | None, scale: float) -> Tensor:
        """Return ``master + scale * direction``: a new tensor, or the master itself without a direction."""
        return self.master.detach() if direction is None else torch.add(self.master.detach(), direction, alpha=scale)

    @abstractmethod
    def write(self, direction: Tensor | None, scale: float) -> None:
        """Write ``master + scale * direction`` to the live tensor, with one rounding to its dtype."""

    @abstractmethod
    def to_master_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the master, float32, from that of the live tensor."""

    def applied(self, direction: Tensor, high: float, low: float) -> Tensor:
        """Return the direction that the live tensor really moves along, after rounding to its dtype.

        This is the difference of the live tensors at ``high`` and ``low`` along ``direction``, divided by ``high - low``, in the
        shape of the master. In float32 it differs from ``direction`` by less than the noise of an estimate, so ``direction``
        itself is returned.
        """
        if self.live.dtype == torch.float32:
            return direction
        ends = [self._unrounded(self.moved(direction, s)).to(self.live.dtype).float() for s in (high, low)]
        return self._coordinates((ends[0] - ends[1]) / (high - low))

    def _unrounded(self, master: Tensor) -> Tensor:
        """The elements of the live tensor for a value of the master, before rounding."""
        return master

    def _coordinates(self, difference: Tensor) -> Tensor:
        """Map a difference of two results of :meth:`_unrounded` to the shape of the master."""
        return difference

    def constants(self) -> dict[str, Tensor]:
        """Return the tensors, other than the master, that a checkpoint must hold, by name of the constructor argument."""
        return {}

    def low_rank(self) -> LowRank | None:
        """Return the change from the initial value in LoRA's form, or ``None`` if the change is not of low rank."""
        return None


class Whole(TunedTensor):
    """Tunes every element of a tensor."""

    kind = "whole"

    def __init__(self, live: Tensor) -> None:
        super().__init__(live, live.detach().to(torch.float32, copy=True))

    def write(self, direction: Tensor | None, scale: float) -> None:
        if direction is not None and self.live.dtype == torch.float32:
            torch.add(self.master, direction, alpha=scale, out=self.live)
        else:
            self.live.copy_(self.moved(direction, scale))

    def to_master_gradient(self, gradient: Tensor) -> Tensor:
        return gradient.float()


class Masked(TunedTensor):
    """Tunes some elements of a tensor; the master holds only these.

    Args:
        live: The model's tensor, contiguous.
        index: Indices of the elements in the flattened tensor, shape (K,), int64 or int32, K >= 1.
    """

    kind = "masked"
    index: Tensor

    def __init__(self, live: Tensor, index: Tensor) -> None:
        if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1 or not index.numel():
            raise ValueError("its index is not a list of element numbers")
        if int(index.min()) < 0 or int(index.max()) >= live.numel():
            raise ValueError("its index is out of the tensor's range")
        # int64 would take more memory than the master itself
        index = index.to(live.device, torch.int32 if live.numel() < 2**31 else torch.int64)
        super().__init__(live, live.detach().view(-1)[index].to(torch.float32, copy=True))
        self.register_buffer("index", index, persistent=False)

    def write(self, direction: Tensor | None, scale: float) -> None:
        self.live.view(-1)[self.index] = self.moved(direction, scale).to(self.live.dtype)

    def to_master_gradient(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1)[self.index].float()

    def constants(self) -> dict[str, Tensor]:
        return {"index": self.index}


class Subspace(TunedTensor):
    """Tunes a matrix within a subspace of its inputs: W = W0 + C V^T, where C is tuned (ZO-Act, arXiv 2607.01125).

    Args:
        live: W, shape (out, in), or (in, out) if ``transposed``.
        basis: V, shape (in, r), orthonormal columns, float32.
        transposed: Whether the weight is stored as (in, out), as in GPT-2.
    """

    kind = "subspace"
    basis: Tensor
    base: Tensor

    def __init__(self, live: Tensor, basis: Tensor, transposed: bool | Tensor) -> None:
        self.transposed = bool(transposed)
        if live.dim() != 2 or basis.dim() != 2 or basis.shape[0] != live.shape[1 - int(self.transposed)]:
            raise ValueError(f"its basis of shape {list(basis.shape)} does not match the weight")
        super().__init__(live, torch.zeros(live.shape[int(self.transposed)], basis.shape[1], device=live.device))
        self.register_buffer("basis", basis.to(live.device, torch.float32), persistent=False)
        self.register_buffer("base", live.detach().clone(), persistent=False)

    def write(self, direction: Tensor | None, scale: float) -> None:
        self.live.copy_(self._unrounded(self.moved(direction, scale)))

    def _unrounded(self, master: Tensor) -> Tensor:
        full = master @ self.basis.T
        return (full.T if self.transposed else full).add_(self.base)

    def _coordinates(self, difference: Tensor) -> Tensor:
        return self.to_master_gradient(difference)  # drops the part of the rounding error that is outside the subspace

    def to_master_gradient(self, gradient: Tensor) -> Tensor:
        return (gradient.float().T if self.transposed else gradient.float()) @ self.basis

    def constants(self) -> dict[str, Tensor]:
        return {"basis": self.basis, "transposed": torch.tensor(self.transposed)}

    def low_rank(self) -> LowRank:
        return LowRank(self.basis.T, self.master, transposed=self.transposed)


KINDS: Mapping[str, Callable[..., TunedTensor]] = {each.kind: each for each in (Whole, Masked, Subspace)}
"""The classes by kind. Each is called with the model's tensor and the items of :meth:`TunedTensor.constants`."""
