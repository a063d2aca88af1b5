"""Models whose decoder layers are divided over processes; before a layer runs, all gather its weights (``shard_group.py``)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slzo.models.decoder_layers import find_decoder_layers, layer_of
from slzo.models.engine import DType
from slzo.models.load import load_model
from slzo.models.placement import Placement
from slzo.models.quantization import is_plain
from slzo.models.shard_group import MOST_IDLE, ShardGroup
from slzo.utils.console import rank_zero_print
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel


class ShardedLayers(Placement):
    """Decoder layers of a model on the CPU, divided over processes. Making them is a collective call.

    ``main`` is the device of this process.

    Attributes:
        group: The processes.
        share: This process's part of the values of the layers.

    Raises:
        SlzoError: A tensor of a layer cannot be divided.
    """

    offloads = True
    num_kept = MOST_IDLE
    runs_copies = False  # the processes gather the weights of the layer itself

    def __init__(self, model: PreTrainedModel, group: ShardGroup, main: torch.device) -> None:
        self.group = group
        self._path, layers = find_decoder_layers(model)
        whole = sum(tensor.numel() for tensor in layers.parameters())
        self._layers = [_Layer(layer, group, main) for layer in layers]
        self.share = sum(layer.num_held for layer in self._layers) / whole
        _move_rest(model, main)

    @torch.no_grad()
    def load_layers(self, numbers: Collection[int]) -> None:
        if len(set(numbers)) == len(self._layers):
            raise SlzoError(
                "trainer.strategy sharded: the processes share the frozen layers, and model.scope tunes all; use a scope of some "
                "layers, such as LayerScope, or ddp"
            )
        for number in sorted(set(numbers)):
            self._layers[number].load()

    @torch.no_grad()
    def return_layers(self, numbers: Collection[int]) -> None:
        for number in sorted(set(numbers)):
            self._layers[number].give_back()

    def values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for number, named in groupby(model.named_parameters(), lambda named: layer_of(named[0], self._path)):
            if number is None:
                yield from named
                continue
            names = [name for name, _ in named]
            with self._layers[number].whole():
                yield from ((name, model.get_parameter(name)) for name in names)

    def barrier(self) -> None:
        self.group.barrier()


class _Layer:
    """A decoder layer whose tensors have values only while it runs, or after :meth:`load`."""

    def __init__(self, layer: nn.Module, group: ShardGroup, main: torch.device) -> None:
        self._module = layer
        named = dict(layer.named_parameters())
        if wrong := next((name for name, tensor in named.items() if not is_plain(tensor) or tensor.dim() == 0), None):
            raise SlzoError(
                f"trainer.strategy sharded: tensor {wrong!r} of a layer is quantized or a single number, and cannot be divided; "
                "use ddp"
            )
        # each tensor with all of its places in the layer
        places: dict[int, list[str]] = {}
        for name, tensor in layer.named_parameters(remove_duplicate=False):
            places.setdefault(id(tensor), []).append(name)
        self._places = list(places.values())
        self._shard = group.divide([tensor.detach().to(main).contiguous() for tensor in named.values()])
        self.num_held = sum(cast("DTensor", tensor).to_local().numel() for tensor in self._shard.tensors)
        self._absent = [
            nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False) for tensor in named.values()
        ]
        self._set(self._absent)
        self._handles: list[RemovableHandle] = []
        self._add_hooks()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Give the tensors their values for a while."""
        if not self._handles:
            yield
            return
        self._bring()
        try:
            yield
        finally:
            self._take_away()

    def load(self) -> None:
        """Give the tensors values of their own."""
        if not self._handles:
            return
        with self.whole():
            copies = [nn.Parameter(tensor.clone(), requires_grad=False) for tensor in self._module.parameters()]
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._set(copies)

    def give_back(self) -> None:
        """Undo :meth:`load`, unless the values have changed or tensors were added."""
        if self._handles:
            return
        own = list(self._module.parameters())
        shared = self._shard.gather()
        same = len(own) == len(shared) and all(map(torch.equal, own, shared))
        self._shard.drop()
        if same:
            self._set(self._absent)
            self._add_hooks()

    def _add_hooks(self) -> None:
        # hooks of the layer are also those of its copies, which share its tensors
        self._handles = [
            self._module.register_forward_pre_hook(lambda *_: self._bring()),
            self._module.register_forward_hook(lambda *_: self._take_away(), always_call=True),
        ]

    def _bring(self) -> None:
        self._set(self._shard.gather())

    def _take_away(self) -> None:
        self._set(self._absent)
        self._shard.drop()

    def _set(self, tensors: list[nn.Parameter]) -> None:
        for names, tensor in zip(self._places, tensors, strict=True):
            for name in names:
                path, _, last = name.rpartition(".")
                setattr(self._module.get_submodule(path), last, tensor)


def _move_rest(model: nn.Module, main: torch.device) -> None:
    """Move everything but the layers' tensors, which have no values."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(main)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(main))


def load_sharded(
    name: str, dtype: DType, trust_remote_code: bool, group: ShardGroup, main: torch.device
) -> tuple[PreTrainedModel, ShardedLayers]:
    """Load a frozen causal language model and divide its layers over processes. A collective call.

    For arguments see :func:`slzo.models.load.load_model`. Each process reads the whole model into CPU memory, or maps it if its
    files have this type, and keeps its share of each layer on ``main``.

    Raises:
        SlzoError: The model cannot be loaded or divided.
    """
    model = load_model(name, dtype, trust_remote_code)
    placement = ShardedLayers(model, group, main)
    rank_zero_print(
        f"Layers     divided over {group.world_size} processes, {placement.share:.0%} of their weights here"
    )
    return model, placement


def check_shard_group(placement: Placement, group: ShardGroup | None) -> None:
    """Check that the processes that share the layers of a model, if any do, are those of the trainer.

    Raises:
        SlzoError: They belong to another trainer.
    """
    if isinstance(placement, ShardedLayers) and placement.group is not group:
        raise SlzoError(
            "trainer.strategy: the layers of this model are divided over the processes of another trainer; use that trainer, or "
            "load the checkpoint into a new ZOModule"
        )
