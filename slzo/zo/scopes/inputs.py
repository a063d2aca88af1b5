"""What enters the linear maps of a layer, recorded on a few prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slzo.batches.packing import PackedBatch
from slzo.models.parts import ModelParts


@torch.no_grad()
def record_inputs(parts: ModelParts, modules: Sequence[nn.Module], batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Inputs of some linear maps over all tokens of some batches, one tensor per module, shape (tokens, inputs), float32."""
    # oneDNN's stand-ins and compiled layers would not call the hooks
    plain = ModelParts(parts.model, parts.packed, onednn=False) if parts.onednn or parts.compile else parts
    plain.prepare()  # what it runs must not be recorded
    found: list[list[Tensor]] = [[] for _ in modules]

    def recorder(place: int, batch: PackedBatch) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states = inputs[0].detach()
            if states.dim() == 2:  # OPT flattens what enters its MLP
                rows = 1 if plain.packed else sum(group.shape[0] for group in batch.layout.groups)
                states = states.unflatten(0, (rows, -1))
            found[place].append(plain.to_packed(states, batch).float())

        return hook

    for batch in batches:
        handles = [m.register_forward_pre_hook(recorder(place, batch)) for place, m in enumerate(modules)]
        try:
            plain.run(batch, 0, plain.num_layers)
        finally:
            for handle in handles:
                handle.remove()
    return [torch.cat(pieces) for pieces in found]
