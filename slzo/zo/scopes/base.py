"""What a scope is given and what it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from slzo.batches.packing import PackedBatch
from slzo.models.adapters import Adapter
from slzo.models.parts import ModelParts
from slzo.utils.errors import SlzoError
from slzo.zo.tuned import Subset, TunedTensors

Layers = list[int] | Literal["all"] | None
"""Decoder layers, counted from 0; ``None`` is the dominant layer."""


@dataclass(frozen=True)
class ScopeContext:
    """What a scope may look at.

    Attributes:
        parts: The model.
        layer: The dominant layer, unless the scope does not need one.
        prompts: Packed prompts of so many training rows, on the model's device.
        seed: The run's seed.
    """

    parts: ModelParts
    layer: int | None
    prompts: Callable[[int], Sequence[PackedBatch]]
    seed: int = 0


class Scope(ABC):
    """Names the tensors, or elements of them, that are tuned.

    Attributes:
        layers: The decoder layers that it is about; those that are about the whole model say ``"all"``.
    """

    layers: Layers = None

    @abstractmethod
    def tensors(self, context: ScopeContext) -> TunedTensors:
        """Masters of what is tuned, made from the model's present weights.

        Raises:
            SlzoError: Nothing in the model fits.
        """

    @abstractmethod
    def describe(self) -> str:
        """In a few words, for the summary; equal for equal scopes."""

    @property
    def needs_layer(self) -> bool:
        """Whether the dominant layer has to be known."""
        return self.layers is None

    @property
    def num_positions(self) -> int:
        """Positions that the scope puts before every sequence."""
        return 0

    def changed_layers(self, context: ScopeContext) -> list[int]:
        """Layers whose weights it changes; those of a quantized model are put in full precision first.

        Raises:
            SlzoError: The model lacks one of them.
        """
        return resolve_layers(self.layers, context)

    def adapter(self, context: ScopeContext) -> Adapter | None:
        """Modules to add to the model first; the model's parts are made again after that."""
        return None

    def subset(self, names: Sequence[str], parts: ModelParts) -> Subset | None:
        """Which of the tuned tensors are perturbed in a step; ``None`` for all in each step."""
        return None


def check_layer(layer: int, num_layers: int, option: str = "model.layer", left_out: str = "the profile choose") -> int:
    """Return ``layer``, which ``option`` gave, if the model has it; ``left_out`` says what happens without the option.

    Raises:
        SlzoError: The model has no such layer.
    """
    if not 0 <= layer < num_layers:
        raise SlzoError(
            f"{option} {layer}: the model has {num_layers} decoder layers, choose 0 to {num_layers - 1} "
            f"or leave it out to let {left_out}"
        )
    return layer


def resolve_layers(layers: Layers, context: ScopeContext) -> list[int]:
    """The layers as sorted numbers; SlzoError if the model lacks one of them, or the list is empty."""
    num_layers = context.parts.num_layers
    if layers is None:
        if context.layer is None:
            raise SlzoError("model.scope.layers: no dominant layer is known; set model.layer or give a list of layers")
        return [check_layer(context.layer, num_layers)]
    if layers == "all":
        return list(range(num_layers))
    if not layers:
        raise SlzoError("model.scope.layers []: give at least one layer, or leave it out for the dominant layer")
    return sorted({check_layer(layer, num_layers, "model.scope.layers") for layer in layers})


def describe_layers(layers: Layers) -> str:
    """``the dominant layer``, ``all layers`` or ``layers 1, 2``."""
    if layers is None:
        return "the dominant layer"
    return "all layers" if layers == "all" else "layers " + ", ".join(map(str, sorted(set(layers))))
