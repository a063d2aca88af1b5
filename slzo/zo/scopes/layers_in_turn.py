"""Whole decoder layers, one after the other, from the top down."""

from collections.abc import Sequence

from slzo.errors import SlzoError
from slzo.models.parts import ModelParts
from slzo.zo.scopes.base import Layers, Scope, ScopeContext, check_layer, describe_layers
from slzo.zo.scopes.layer import LayerScope
from slzo.zo.tuned import Subset, TunedTensors

_LAST = 4


class LayersInTurn(Scope):
    """Whole layers, the highest first; the next lower one follows when the dev loss has stopped falling.

    A step then costs only the layers above the one that is tuned, and the states that enter it do not depend on what was tuned
    before. What is left of a layer are the weights that had the lowest dev loss (guard.factor null: its last ones). With
    model.optimizer.lr auto each layer's step is measured when its turn comes.

    Args:
        layers: Decoder layers, counted from 0; left out, the last four.
        patience: Validations in a row without a lower dev loss after which the next layer is tuned, >= 1.
        routers: In a mixture of experts tune the routers too; left out they stay.
    """

    def __init__(self, layers: list[int] | None = None, patience: int = 2, routers: bool = False) -> None:
        if layers is not None and len(set(layers)) < 2:
            raise SlzoError(f"model.scope.layers {layers}: give at least two layers, or model.scope LayerScope for one")
        if patience < 1:
            raise SlzoError(f"model.scope.patience {patience}: at least 1 validation is needed to see no gain")
        self.layers: Layers = layers
        self.patience = patience
        self.routers = routers

    @property
    def needs_layer(self) -> bool:
        return False

    def turns(self, parts: ModelParts) -> Sequence[int]:
        """The layers, the highest first."""
        last = range(max(0, parts.num_layers - _LAST), parts.num_layers)
        chosen = last if self.layers is None or self.layers == "all" else self.layers
        numbers = {
            check_layer(layer, parts.num_layers, "model.scope.layers", f"the last {_LAST} be tuned") for layer in chosen
        }
        return sorted(numbers, reverse=True)

    def changed_layers(self, context: ScopeContext) -> list[int]:
        return sorted(self.turns(context.parts))

    def tensors(self, context: ScopeContext) -> TunedTensors:
        tensors = LayerScope(layers=self.changed_layers(context), routers=self.routers).tensors(context)
        tensors.subset = self.subset(tensors.names, context.parts)
        return tensors

    def subset(self, names: Sequence[str], parts: ModelParts) -> Subset:
        start = f"{parts.layers_path}.{self.turns(parts)[0]}."
        first = [name for name in names if name.startswith(start)]
        return lambda seed, step: first

    def describe(self) -> str:
        which = f"the last {_LAST} layers" if self.layers is None else describe_layers(self.layers)
        return f"{which} in turn" + (" with routers" if self.routers else "")
