"""Whole decoder layers, or their attention or MLP."""

from typing import Literal

from slzo.utils.argument_checks import check_choice
from slzo.utils.errors import SlzoError
from slzo.zo.scopes.base import Layers, Scope, ScopeContext, check_layers, describe_layers, resolve_layers
from slzo.zo.scopes.linear_maps import is_router, layer_parameters, part_of
from slzo.zo.tuned import TunedTensors

Part = Literal["layer", "attention", "mlp"]


class LayerScope(Scope):
    """Every parameter of a decoder layer (the paper's "FT"), or of its attention or MLP, including biases and experts.

    Args:
        part: The whole layer, its attention, or its MLP.
        layers: Decoder layers, counted from 0, or all; by default the dominant layer.
        routers: Also tune the router of a mixture of experts; by default it is not tuned, because a changed router sends tokens
            to other experts, and the loss jumps.
    """

    def __init__(self, part: Part = "layer", layers: Layers = None, routers: bool = False) -> None:
        check_choice("model.scope.part", part, Part)
        self.part = part
        self.layers = check_layers(layers)
        self.routers = routers

    def tensors(self, context: ScopeContext) -> TunedTensors:
        parts = context.parts
        chosen = {}
        for layer in resolve_layers(self.layers, context):
            module = parts.layers[layer]
            for name, tensor in layer_parameters(parts, layer).items():
                path = name.removeprefix(f"{parts.layers_path}.{layer}.")
                in_part = self.part == "layer" or part_of(module, path) == self.part
                if in_part and (self.routers or not is_router(module, path)):
                    chosen[name] = tensor
        if not chosen:
            raise SlzoError(
                f"model.scope.part {self.part!r}: the layer has no such tensors; choose layer, attention or mlp"
            )
        return TunedTensors(chosen)

    def describe(self) -> str:
        part = "" if self.part == "layer" else f"the {self.part} of "
        return part + describe_layers(self.layers) + (" with routers" if self.routers else "")
