"""Directions of low rank, kept as their factors until someone needs a whole matrix."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor


class Factors(NamedTuple):
    """A matrix ``left @ right.T``.

    Attributes:
        left: Shape (rows, r).
        right: Shape (columns, r).
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The matrix, a new tensor."""
        return self.left @ self.right.T


class FactoredDirection(Mapping[str, Tensor]):
    """A direction whose matrices are made of their factors when they are first asked for, and kept then.

    Args:
        drawn: Each tensor, or its factors, by name.
    """

    def __init__(self, drawn: Mapping[str, Tensor | Factors]) -> None:
        self.drawn = drawn
        self._dense: dict[str, Tensor] = {}

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the matrix
        return name in self.drawn

    def __getitem__(self, name: str) -> Tensor:
        drawn = self.drawn[name]
        if not isinstance(drawn, Factors):
            return drawn
        if name not in self._dense:
            self._dense[name] = drawn.dense()
        return self._dense[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.drawn)

    def __len__(self) -> int:
        return len(self.drawn)


def drawn_of(direction: Mapping[str, Tensor], name: str) -> Tensor | Factors:
    """One tensor of a direction, as factors where it is drawn as such."""
    return direction.drawn[name] if isinstance(direction, FactoredDirection) else direction[name]
