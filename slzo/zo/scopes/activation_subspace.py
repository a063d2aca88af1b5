"""A low-rank subspace of the inputs of the dominant layer's linear maps."""

import torch
from torch import Tensor

from slzo.utils.argument_checks import check_at_least
from slzo.utils.errors import SlzoError
from slzo.zo.scopes.base import Layers, Scope, ScopeContext, check_layers, describe_layers, resolve_layers
from slzo.zo.scopes.inputs import record_inputs
from slzo.zo.scopes.linear_maps import targets
from slzo.zo.tuned import TunedTensors
from slzo.zo.tuned_tensor import Subspace

# Tokens for the singular value decomposition. A few thousand span the same subspace as all tokens.
_MAX_TOKENS = 2048
_NUM_PROMPTS = 64


class ActivationSubspace(Scope):
    """Each linear map W of the layer moves as W0 + C V^T, with V spanning its inputs; only C (outputs, rank) is tuned.

    The gradient of a linear map lies in the span of its inputs, and the noise of a zeroth-order estimate grows with the number of
    tuned elements. V holds the top right singular vectors of the inputs on 64 prompts. Each token's input is scaled to unit
    norm, since otherwise a single outlier would determine the first direction. The idea is from ZO-Act (arXiv 2607.01125), which
    tunes all layers.

    Args:
        rank: Directions per linear map, >= 1.
        target_modules: Names of the linear maps to tune, like down_proj; mlp_output is the MLP's last one, however it is
            called; by default all of the layer's.
        layers: Decoder layers, counted from 0, or all; by default the dominant layer.
    """

    def __init__(self, rank: int = 16, target_modules: list[str] | None = None, layers: Layers = None) -> None:
        check_at_least("model.scope.rank", rank)
        self.rank = rank
        self.target_modules = target_modules
        self.layers = check_layers(layers)

    def tensors(self, context: ScopeContext) -> TunedTensors:
        layers = resolve_layers(self.layers, context)
        maps = [linear for layer in layers for linear in targets(context.parts, layer, self.target_modules)]
        inputs = record_inputs(context.parts, [m.module for m in maps], context.prompts(_NUM_PROMPTS))
        bases = [self._basis(m.name, x) for m, x in zip(maps, inputs, strict=True)]
        return TunedTensors({m.name: Subspace(m.weight, v, m.transposed) for m, v in zip(maps, bases, strict=True)})

    def _basis(self, name: str, inputs: Tensor) -> Tensor:
        """Return the top right singular vectors of ``inputs`` (tokens, in), shape (in, rank)."""
        rows = inputs[torch.linspace(0, len(inputs) - 1, min(len(inputs), _MAX_TOKENS), device=inputs.device).long()]
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        if self.rank > min(rows.shape):
            raise SlzoError(
                f"model.scope.rank {self.rank}: the inputs of {name} on {_NUM_PROMPTS} prompts span at most {min(rows.shape)} "
                "directions; lower it"
            )
        return torch.linalg.svd(rows, full_matrices=False).Vh[: self.rank].T.contiguous()

    def describe(self) -> str:
        modules = "" if self.target_modules is None else f" of {', '.join(self.target_modules)}"
        return f"an activation subspace of rank {self.rank}{modules} in {describe_layers(self.layers)}"
