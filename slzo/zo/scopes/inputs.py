"""Records the inputs of linear maps on some prompts."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from slzo.batches.packing import PackedBatch
from slzo.models.parts import ModelParts


@torch.no_grad()
def record_inputs(parts: ModelParts, modules: Sequence[nn.Module], batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Return the inputs of linear maps for all tokens of some batches: for each module a float32 tensor (tokens, inputs)."""
    # copies of linear maps that run through oneDNN do not call the hooks of the maps
    plain = ModelParts(parts.model, parts.packed, onednn=False) if parts.onednn else parts
    plain.prepare()  # runs the model, so it must come before the hooks
    recorded: list[list[Tensor]] = [[] for _ in modules]

    def recorder(number: int, batch: PackedBatch) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states = inputs[0].detach()
            if states.dim() == 2:  # OPT flattens the input of its MLP
                rows = 1 if plain.packed else sum(group.shape[0] for group in batch.layout.groups)
                states = states.unflatten(0, (rows, -1))
            recorded[number].append(plain.to_packed(states, batch).float())

        return hook

    for batch in batches:
        with ExitStack() as hooks:
            for number, module in enumerate(modules):
                hooks.enter_context(module.register_forward_pre_hook(recorder(number, batch)))
            plain.run(batch, 0, plain.num_layers)
    return [torch.cat(pieces) for pieces in recorded]
