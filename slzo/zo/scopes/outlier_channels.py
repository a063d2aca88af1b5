"""The outlier channels of a layer's MLP, or all its other channels."""

import torch
from torch import Tensor

from slzo.utils.errors import SlzoError
from slzo.zo.scopes.base import Scope, ScopeContext, resolve_layers
from slzo.zo.scopes.inputs import record_inputs
from slzo.zo.scopes.linear_maps import Linear, check_no_experts, linears, mlp_maps
from slzo.zo.tuned import TunedTensors
from slzo.zo.tuned_tensor import Masked

_NUM_PROMPTS = 16


class OutlierChannels(Scope):
    """The hidden channels of the dominant layer's MLP with the largest activations, or all others.

    A channel is an input of the down projection: one of its columns, and the rows (with their biases) of the projections that
    compute it. Its size is its largest magnitude on 16 prompts. Dominant-Layer ZO has two such ablations: tuning only the top
    1% of the channels, and freezing them.

    Args:
        percent: Share of the channels that counts as outliers, in (0, 100].
        complement: Tune all of the MLP but these channels.
    """

    def __init__(self, percent: float = 1.0, complement: bool = False) -> None:
        if not 0 < percent <= 100:
            raise SlzoError(f"model.scope.percent {percent}: must be above 0 and at most 100")
        self.percent = percent
        self.complement = complement

    def tensors(self, context: ScopeContext) -> TunedTensors:
        (layer,) = resolve_layers(None, context)
        check_no_experts(context.parts, layer, "model.scope OutlierChannels")
        maps = mlp_maps(context.parts, linears(context.parts, layer))
        ups = [up for up in maps[:-1] if up.sizes[0] % maps[-1].sizes[1] == 0]
        if not ups:
            raise SlzoError(
                "model.scope OutlierChannels: the layer has no MLP with up and down projections; use LayerScope"
            )
        down = maps[-1]
        num_channels = down.sizes[1]
        count = round(self.percent / 100 * num_channels)
        if count == 0:
            raise SlzoError(
                f"model.scope.percent {self.percent}: selects none of the {num_channels} channels of the MLP; raise it"
            )
        if self.complement and count == num_channels:
            raise SlzoError(
                f"model.scope.percent {self.percent} with complement: selects all {num_channels} channels of the MLP and leaves "
                "none to tune; lower it"
            )
        (inputs,) = record_inputs(context.parts, [down.module], context.prompts(_NUM_PROMPTS))
        chosen = torch.full((num_channels,), self.complement, device=inputs.device)
        chosen[inputs.abs().amax(dim=0).topk(count).indices] = not self.complement
        tensors = {down.name: Masked(down.weight, _places(down, chosen, of_inputs=True))}
        for up in ups:
            wide = chosen.repeat(up.sizes[0] // num_channels)  # Phi-3 has gate and up in one matrix
            tensors[up.name] = Masked(up.weight, _places(up, wide, of_inputs=False))
            bias = getattr(up.module, "bias", None)
            if bias is not None:
                tensors[up.name.removesuffix("weight") + "bias"] = Masked(bias, wide.nonzero()[:, 0])
        return TunedTensors(tensors)

    def describe(self) -> str:
        which = "all but the top" if self.complement else "the top"
        return f"{which} {self.percent:g}% outlier channels of the dominant layer's MLP"


def _places(linear: Linear, chosen: Tensor, of_inputs: bool) -> Tensor:
    """Return the indices, in the flattened weight, of the elements of the chosen inputs or outputs."""
    outputs, inputs = linear.sizes
    mask = chosen[None, :].expand(outputs, inputs) if of_inputs else chosen[:, None].expand(outputs, inputs)
    return (mask.T if linear.transposed else mask).flatten().nonzero()[:, 0]
