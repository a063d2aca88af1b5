"""Where the weights of decoder layers are, if they are not all on the main device of their model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import WeakKeyDictionary

from torch import Tensor, nn


class Placement(ABC):
    """Manages the layers of a loaded model whose weights are elsewhere.

    A run of such a layer moves the weights or the states to one device.

    Attributes:
        offloads: Whether some layers need their weights read, copied or gathered for each run.
        num_kept: Number of such layers whose weights stay after their use, until those of others are needed.
        elsewhere: Where the layers are if some run on another device, such as ``layers 0 to 3 on cuda:0, 4 to 29 on cuda:1``;
            otherwise empty.
    """

    offloads: bool = True
    num_kept: int = 0
    elsewhere: str = ""

    @abstractmethod
    def load_layers(self, numbers: Collection[int]) -> None:
        """Copy layers to the main device so that they can be changed, until :meth:`return_layers`.

        Raises:
            SlzoError: ``numbers`` are all layers, but some belong elsewhere.
        """

    @abstractmethod
    def return_layers(self, numbers: Collection[int]) -> None:
        """Put layers back to their own places, except for those whose values have changed."""

    @abstractmethod
    def values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the values of each parameter of the model, bringing those elsewhere here one layer at a time."""

    @contextmanager
    def visit(self, number: int) -> Iterator[None]:
        """Bring the weights of a layer here once for all its runs in this context.

        By default nothing is done: gathered layers stay after their use anyway, see ``num_kept``.
        """
        yield

    def barrier(self) -> None:  # noqa: B027 - only for layers that processes gather together
        """Wait until all processes are here, and join in gathering the layers that the others still run."""


_PLACED: WeakKeyDictionary[nn.Module, Placement] = WeakKeyDictionary()


def place(model: nn.Module, placement: Placement) -> None:
    """Let a placement manage the layers of a model from now on."""
    _PLACED[model] = placement


def placement_of(model: nn.Module) -> Placement | None:
    """Return the placement of a model; ``None`` if all layers are on its main device."""
    return _PLACED.get(model)


def named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the values of each parameter of a model, wherever they are stored; copy what you keep."""
    placement = placement_of(model)
    return model.named_parameters() if placement is None else placement.values(model)


def visit(model: nn.Module, number: int) -> AbstractContextManager[None]:
    """Bring the weights of a layer here once for all its runs in a context, see :meth:`Placement.visit`."""
    placement = placement_of(model)
    return nullcontext() if placement is None else placement.visit(number)


def layer_barrier(model: nn.Module) -> None:
    """Wait for the other processes if they share the layers of a model; needed before any other exchange with them."""
    if (placement := placement_of(model)) is not None:
        placement.barrier()
