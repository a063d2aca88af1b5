"""Records the inputs of linear maps on some prompts."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from slzo.batches.packing import PackedBatch
from slzo.models.parts import ModelParts
from slzo.utils.errors import SlzoError


@torch.no_grad()
def record_inputs(parts: ModelParts, modules: Sequence[nn.Module], batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Return the inputs of linear maps for all tokens of some batches: for each module a float32 tensor (tokens, inputs).

    Raises:
        SlzoError: The model does not run a map once for each token.
    """
    # copies of linear maps that run through oneDNN do not call the hooks of the maps
    plain = parts.rebuilt(onednn=False) if parts.onednn else parts
    plain.prepare()  # runs the model, so it must come before the hooks
    recorded: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def record(batch: PackedBatch, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states = inputs[0].detach().flatten(0, -2)  # OPT does so itself before its MLP
        shape = (1, batch.num_tokens) if plain.packed else batch.layout.in_one_group.groups[0].shape
        if len(states) != math.prod(shape):
            _refuse(parts, module)
        recorded[module].append(plain.to_packed(states.unflatten(0, shape), batch).float())

    for batch in batches:
        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(partial(record, batch)))
            plain.run(batch, 0, plain.num_layers)
    for module, pieces in recorded.items():
        if not pieces:
            _refuse(parts, module)
    return [torch.cat(pieces) for pieces in recorded.values()]


def _refuse(parts: ModelParts, module: nn.Module) -> NoReturn:
    name = next(name for name, other in parts.model.named_modules() if other is module)
    raise SlzoError(
        f"model.scope: the model does not run {name} once for each token, so its inputs are not known; set "
        "model.scope.target_modules to other linear maps, or use LayerScope"
    )
