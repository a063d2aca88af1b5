"""Which layers hold what is tuned."""

from typing import NamedTuple, Self

from slzo.models.parts import ModelParts
from slzo.zo.tuned import TunedTensors


class Span(NamedTuple):
    """The layers that hold tuned tensors.

    Attributes:
        start: First of them; the layers before it are the prefix.
        stop: One past the last of them.
        inside: Whether no tensor outside of the decoder layers (embeddings, final norm, head) is tuned.
    """

    start: int
    stop: int
    inside: bool = True

    @classmethod
    def of(cls, parts: ModelParts, tuned: TunedTensors) -> Self:
        """The layers of a model that some tensors belong to."""
        owner = {id(tensor): index for index, layer in enumerate(parts.layers) for tensor in layer.parameters()}
        layers = {owner.get(id(tensor.live), -1) for _, tensor in tuned.items()}
        if -1 in layers:
            return cls(0, parts.num_layers, inside=False)
        return cls(min(layers), max(layers) + 1)
