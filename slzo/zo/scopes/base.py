"""The base class of scopes and what a scope can use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slzo.batches.packing import PackedBatch
from slzo.models.adapters import Adapter
from slzo.models.parts import ModelParts
from slzo.utils.argument_checks import ChecksOverrides, check_integer
from slzo.utils.errors import SlzoError, broken_contract, short_repr
from slzo.zo.scopes.linear_maps import check_own_tensors
from slzo.zo.tuned import Subset, TunedTensors

Layers = list[int] | Literal["all"] | None
"""Numbers of decoder layers, counted from 0; ``None`` means the dominant layer."""


def is_one_layer(layers: Any) -> bool:
    """Whether the layers of a scope are one layer."""
    return layers is None or (_is_list(layers) and len(set(layers)) == 1)


def _is_list(layers: Any) -> bool:
    return isinstance(layers, Collection) and not isinstance(layers, str)


def check_layers(layers: Layers) -> Layers:
    """Return the layers of a scope.

    Raises:
        SlzoError: They are not a list of numbers, all or ``None``.
    """
    numbers = _is_list(layers) and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers or ())
    if not numbers and not (layers is None or (isinstance(layers, str) and layers == "all")):
        raise SlzoError(
            f"model.scope.layers {layers!r}: give a list of numbers, such as [28], or all, or leave it out for the dominant layer"
        )
    return layers


def no_prompts(num_sequences: int) -> Sequence[PackedBatch]:
    """Raise an error: the scope needs prompts, and none were given."""
    raise SlzoError("model.scope: needs prompts, and none were given; pass prompts")


@dataclass(frozen=True)
class ScopeContext:
    """What a scope can use to choose tensors.

    Attributes:
        parts: The model.
        layer: The dominant layer; may be ``None`` for scopes that need none.
        prompts: Returns the packed prompts of a number of training rows, on the model's device.
        seed: Seed of the run.
    """

    parts: ModelParts
    layer: int | None
    prompts: Callable[[int], Sequence[PackedBatch]] = no_prompts
    seed: int = 0


class Scope(ChecksOverrides, ABC):
    """Chooses the tensors to tune, or some of their elements.

    Attributes:
        layers: The decoder layers of the scope, or ``"all"`` for the whole model.
        num_positions: Number of positions that the scope adds before every sequence.
    """

    layers: Layers = None
    num_positions: int = 0

    @abstractmethod
    def tensors(self, context: ScopeContext) -> TunedTensors:
        """Create the masters of the tuned tensors from the current weights.

        Raises:
            SlzoError: The model has no such tensors.
        """

    @abstractmethod
    def describe(self) -> str:
        """Describe the scope in a few words, for the summary. Equal scopes have equal descriptions."""

    @property
    def needs_layer(self) -> bool:
        """Whether the scope needs the dominant layer."""
        return self.layers is None

    @property
    def one_layer(self) -> bool:
        """Whether the scope is within one decoder layer."""
        return is_one_layer(self.layers)

    def changed_layers(self, context: ScopeContext) -> list[int]:
        """Return the layers whose weights the scope changes. In a quantized model these are first put in full precision.

        Raises:
            SlzoError: The model does not have one of them.
        """
        return resolve_layers(self.layers, context)

    def adapter(self, context: ScopeContext) -> Adapter | None:
        """Return modules to add to the model before :meth:`tensors` is called, or ``None``."""
        return None

    def subset(self, names: Sequence[str], parts: ModelParts) -> Subset | None:
        """Return the function that chooses the tensors to perturb in a step, or ``None`` to perturb all of them."""
        return None


def tensors_of(scope: Scope, context: ScopeContext) -> TunedTensors:
    """Return the tensors that a scope chooses.

    Raises:
        SlzoError: The scope refuses the model, or does not return tensors of it.
    """
    tensors = scope.tensors(context)
    wanted = "TunedTensors of at least one of the model's parameters, by its name in the model"
    if not isinstance(tensors, TunedTensors):
        raise broken_contract("model.scope", scope, f"tensors() returned {short_repr(tensors)}", wanted)
    known = dict(context.parts.model.named_parameters())
    returned = "" if tensors.names else "no tensors"
    for name, tensor in tensors.items():
        if name not in known:
            returned = f"a tensor {name!r}, which the model does not have"
        elif tensor.live.untyped_storage().data_ptr() != known[name].untyped_storage().data_ptr():
            returned = f"a copy of {name!r}, so the model would not change"
        elif (tensor.live.shape, tensor.live.stride()) != (known[name].shape, known[name].stride()):
            returned = f"a part or another view of {name!r}, which no checkpoint could restore"
    if returned:
        raise broken_contract("model.scope", scope, f"tensors() returned {returned}", wanted)
    tensors.subset = scope.subset(tensors.names, context.parts)  # as a resume does
    if not (tensors.subset is None or callable(tensors.subset)):
        returned = f"subset() returned {short_repr(tensors.subset)}"
        raise broken_contract("model.scope", scope, returned, "a function of seed and step, or None")
    tensors.names_of_step(context.seed, 0)  # raises now what would end the first step
    return tensors


def changed_layers_of(scope: Scope, context: ScopeContext) -> list[int]:
    """Return the layers whose weights a scope changes.

    Raises:
        SlzoError: The scope refuses the model, or does not return numbers of layers.
    """
    changed = scope.changed_layers(context)
    if not _is_list(changed) or not all(isinstance(layer, int) for layer in changed):
        returned = f"changed_layers() returned {short_repr(changed)}"
        raise broken_contract("model.scope", scope, returned, "a list of numbers of layers")
    return changed


def adapter_of(scope: Scope, context: ScopeContext) -> Adapter | None:
    """Return the adapter of a scope.

    Raises:
        SlzoError: The scope refuses the model, or returns something else.
    """
    adapter = scope.adapter(context)
    if not isinstance(adapter, Adapter | None):
        returned = f"adapter() returned {short_repr(adapter)}"
        raise broken_contract("model.scope", scope, returned, "an slzo.models.adapters.base.Adapter, or None")
    return adapter


def check_layer(layer: int, num_layers: int, option: str = "model.layer", left_out: str = "the profile choose") -> int:
    """Return ``layer`` if the model has it. ``option`` and ``left_out`` are parts of the error message.

    Raises:
        SlzoError: The model has no such layer, or it is not a whole number.
    """
    check_integer(option, layer)
    if not 0 <= layer < num_layers:
        raise SlzoError(
            f"{option} {layer}: the model has {num_layers} decoder layers; choose 0 to {num_layers - 1} "
            f"or leave it out to let {left_out}"
        )
    return layer


def resolve_layers(layers: Layers, context: ScopeContext) -> list[int]:
    """Return the layers as sorted numbers.

    Raises:
        SlzoError: The model does not have one of them, the list is empty, the dominant layer is not known, or a layer shares
            tensors with others.
    """
    num_layers = context.parts.num_layers
    if layers is None:
        if context.layer is None:
            raise SlzoError("model.scope.layers: no dominant layer is known; set model.layer or give a list of layers")
        chosen = [check_layer(context.layer, num_layers)]
    elif layers == "all":
        chosen = list(range(num_layers))
    elif not layers:
        raise SlzoError("model.scope.layers []: give at least one layer, or leave it out for the dominant layer")
    else:
        chosen = sorted({check_layer(layer, num_layers, "model.scope.layers") for layer in layers})
    for layer in chosen:
        check_own_tensors(context.parts, layer)
    return chosen


def describe_layers(layers: Layers) -> str:
    """Return ``the dominant layer``, ``all layers`` or, for example, ``layers 1, 2``."""
    if layers is None:
        return "the dominant layer"
    return "all layers" if layers == "all" else "layers " + ", ".join(map(str, sorted(set(layers))))
