"""The weights of smallest magnitude."""

import torch

from slzo.utils.errors import SlzoError
from slzo.zo.scopes.base import Layers, Scope, ScopeContext, check_layers, describe_layers, resolve_layers
from slzo.zo.scopes.linear_maps import check_no_experts, linears
from slzo.zo.tuned import TunedTensors
from slzo.zo.tuned_tensor import Masked


class SmallestWeights(Scope):
    """The smallest weights of each matrix, chosen once before training (Sparse-MeZO, arXiv 2402.15751).

    Linear maps of the layers only: norms, biases and embeddings stay as they are.

    Args:
        fraction: Share of each matrix that is tuned, in (0, 1].
        layers: Decoder layers, counted from 0, or all; ``null`` is the dominant layer.
    """

    def __init__(self, fraction: float = 0.25, layers: Layers = "all") -> None:
        if not 0 < fraction <= 1:
            raise SlzoError(f"model.scope.fraction {fraction}: the share of weights must be above 0 and at most 1")
        self.fraction = fraction
        self.layers = check_layers(layers)

    def tensors(self, context: ScopeContext) -> TunedTensors:
        chosen = {}
        for layer in resolve_layers(self.layers, context):
            check_no_experts(context.parts, layer, "model.scope SmallestWeights")
            for linear in linears(context.parts, layer):
                count = int(self.fraction * linear.weight.numel())
                if count == 0:
                    raise SlzoError(
                        f"model.scope.fraction {self.fraction}: selects no element of {linear.name} "
                        f"({linear.weight.numel()} weights); raise it"
                    )
                magnitude = linear.weight.detach().float().abs().flatten()
                index = torch.topk(magnitude, count, largest=False, sorted=False).indices.sort().values
                chosen[linear.name] = Masked(linear.weight, index)
        return TunedTensors(chosen)

    def describe(self) -> str:
        return f"the smallest {100 * self.fraction:g}% of the weights of {describe_layers(self.layers)}"
