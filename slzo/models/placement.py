"""Where the weights of decoder layers are, if they are not all on the main device of their model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Placement:
    """Manages the layers of a loaded model. This class is for a model whose layers are all on its main device.

    Subclasses are for layers whose weights are elsewhere: a run of such a layer moves the weights or the states to one device.

    Attributes:
        offloads: Whether some layers need their weights read, copied or gathered for each run.
        num_kept: Number of such layers whose weights stay after their use, until those of others are needed.
        elsewhere: Where the layers are if some run on another device, such as ``layers 0 to 3 on cuda:0, 4 to 29 on cuda:1``;
            otherwise empty.
        runs_copies: Whether a copy of a layer, also one in another dtype, can run in its place.
    """

    offloads: bool = False
    num_kept: int = 0
    elsewhere: str = ""
    runs_copies: bool = True

    @property
    def is_on_main_device(self) -> bool:
        """Whether the weights of all layers are on the main device."""
        return not (self.offloads or self.elsewhere)

    def load_layers(self, numbers: Collection[int]) -> None:
        """Copy layers to the main device so that they can be changed, until :meth:`return_layers`.

        Raises:
            SlzoError: ``numbers`` are all layers, but some belong elsewhere.
        """

    def return_layers(self, numbers: Collection[int]) -> None:
        """Move layers back to their original devices, except for those whose values have changed."""

    def values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the values of each parameter of the model, wherever they are stored; copy what you keep."""
        yield from model.named_parameters()

    @contextmanager
    def visit(self, number: int) -> Iterator[None]:
        """Bring the weights of a layer here once for all its runs in this context.

        By default nothing is done: gathered layers stay after their use anyway, see ``num_kept``.
        """
        yield

    def barrier(self) -> None:
        """Wait until all processes that share layers are here, and join in gathering what the others still run.

        Needed before any other exchange with them.
        """


ON_MAIN_DEVICE = Placement()
"""Placement of a model whose layers are all on its main device."""
