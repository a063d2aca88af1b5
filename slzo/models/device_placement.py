"""Models whose decoder layers are on several devices or on disk; accelerate's hooks bring weights and states together.

The hooks run as torch hooks, one pair per layer. A layer's weights are copied once for each run of the layer. Copies of a layer
that share its weights (views of a part of the model, layers that run through oneDNN) use the same hooks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slzo.models.attention import VIRTUAL_ARGUMENT
from slzo.models.decoder_layers import layer_of
from slzo.models.device_map import DISK, DeviceMapOptions, LayerDevices
from slzo.models.engine import DType
from slzo.models.load import load_config, load_model
from slzo.models.placement import ON_MAIN_DEVICE, Placement
from slzo.models.shape import skeleton_of
from slzo.models.shared_key_values import ARGUMENT as SHARED_ARGUMENT
from slzo.private.models import arguments_of_any_device, device_hook_of
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from accelerate.hooks import AlignDevicesHook
    from transformers import PreTrainedModel


class DevicePlacement(Placement):
    """Places of layers as ``model.device_map`` says.

    Args:
        model: The model; its layers are where ``places`` says, without values if on disk.
        places: Device of each layer.
        stored: Weights of the layers on disk, by their names in the model; read on access.
    """

    def __init__(self, model: PreTrainedModel, places: LayerDevices, stored: Mapping[str, Tensor]) -> None:
        self.places = places
        self.offloads, self.elsewhere = bool(places.offloaded), places.describe() if places.elsewhere else ""
        self._layers = model.get_submodule(places.path)
        self._stored = stored
        self._skip_keys = [*arguments_of_any_device(model), VIRTUAL_ARGUMENT]
        self._weights: dict[int, Mapping[str, Tensor]] = {}
        self._handles: dict[int, list[RemovableHandle]] = {}
        self._visitors: dict[int, _Visitor] = {}
        for number in places.away:
            self._add_hooks(number)

    @torch.no_grad()
    def load_layers(self, numbers: Collection[int]) -> None:
        if self.places.away and len(set(numbers)) == len(self.places.places):
            raise SlzoError(
                "model.device_map: some layers are not on the main device, and model.scope tunes all; tune only some "
                "layers (LayerScope, OutlierChannels, ActivationSubspace, LoRA), or leave the map out"
            )
        for number in [number for number in numbers if number in self._handles]:
            for handle in self._handles.pop(number):
                handle.remove()
            layer, weights = self._layers.get_submodule(str(number)), self._weights.get(number)
            if weights is None:
                layer.to(self.places.main)
                continue
            values = {
                name: torch.empty_like(tensor, device=self.places.main).copy_(weights[name])
                for name, tensor in layer.named_parameters()
            }
            layer.load_state_dict(values, strict=False, assign=True)

    def return_layers(self, numbers: Collection[int]) -> None:
        for number in set(numbers) & set(self.places.away) - self._handles.keys():
            current = dict(self._layers.get_submodule(str(number)).named_parameters())
            weights = self._weights.get(number)
            if weights is None or all(
                name in weights and torch.equal(tensor.cpu(), weights[name].cpu()) for name, tensor in current.items()
            ):
                self._add_hooks(number)

    @contextmanager
    def visit(self, number: int) -> Iterator[None]:
        if number not in self.places.offloaded or number not in self._handles:
            yield
            return
        with self._visitors[number].staying():
            yield

    def values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        path = self.places.path
        for name, parameter in model.named_parameters():
            number = layer_of(name, path) if parameter.is_meta else None
            yield name, parameter if number is None else self._weights[number][name.removeprefix(f"{path}.{number}.")]

    def _add_hooks(self, number: int) -> None:
        from accelerate.hooks import AlignDevicesHook
        from accelerate.utils import PrefixedDataset

        layer, place = self._layers.get_submodule(str(number)), self.places.places[number]
        offloaded = number in self.places.offloaded
        if place == DISK:
            self._weights[number] = PrefixedDataset(self._stored, f"{self.places.path}.{number}.")
        elif offloaded and number not in self._weights:
            self._weights[number] = {name: tensor.detach() for name, tensor in layer.named_parameters()}
        hook = AlignDevicesHook(
            execution_device=self.places.main if offloaded else place,
            offload=offloaded,
            io_same_device=not offloaded,
            weights_map=self._weights.get(number),
            place_submodules=True,
            skip_keys=self._skip_keys,
        )
        hook.init_hook(layer)
        self._visitors[number] = visitor = _Visitor(hook, layer)
        self._handles[number] = [
            layer.register_forward_pre_hook(visitor.before, with_kwargs=True),
            layer.register_forward_hook(visitor.after, with_kwargs=True, always_call=True),
        ]


@dataclass
class _Visitor:
    """Brings weights and states of a layer together for a run, and takes the weights away after it.

    Attributes:
        hook: Hook of accelerate that does this.
        layer: The layer. Copies of it that share its weights use the same hook.
        stays: Whether the weights are here and stay after a run.
    """

    hook: AlignDevicesHook
    layer: nn.Module
    stays: bool = False

    def before(self, _copy: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args, kwargs) if self.stays else self.hook.pre_forward(self.layer, *args, **kwargs)

    def after(self, _copy: nn.Module, _args: Any, kwargs: Any, output: Any) -> Any:
        if self.stays:
            return output
        shared = kwargs.get(SHARED_ARGUMENT)
        if self.hook.io_same_device and hasattr(shared, "to"):  # older transformers move them in the layers
            shared.to(self.hook.input_device)  # layers on the main device have no hook that would bring them
        return self.hook.post_forward(self.layer, output)

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Bring the weights here for all runs in the context."""
        self.hook.pre_forward(self.layer)
        self.stays = True
        try:
            yield
        finally:
            self.stays = False
            self.hook.post_forward(self.layer, None)


def load_with_device_map(
    name: str, dtype: DType, trust_remote_code: bool, options: DeviceMapOptions, main: torch.device
) -> tuple[PreTrainedModel, Placement]:
    """Load a frozen causal language model with a device map, and place its layers; see :func:`slzo.models.load.load_model`.

    ``main`` is the main device, as for :meth:`DeviceMapOptions.places`.

    Raises:
        SlzoError: The model cannot be loaded with the map.
    """
    from accelerate.hooks import remove_hook_from_module

    skeleton = skeleton_of(load_config(name, trust_remote_code), trust_remote_code)
    skeleton.to(getattr(torch, dtype))
    places = options.places(skeleton, main)
    folder = options.folder()
    model = load_model(
        name,
        dtype,
        trust_remote_code,
        device_map=places.of_modules(skeleton),
        offload_folder=None if folder is None else folder.name,
    )
    if folder is not None:
        finalize(model, folder.cleanup)  # the model reads it, also without its placement
    stored = _stored(model) if DISK in places.places else {}
    remove_hook_from_module(model, recurse=True)  # they are per linear map, and break copies of a layer
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # left by the hooks; a copy of the module would run the original
    return model, DevicePlacement(model, places, stored) if places.away else ON_MAIN_DEVICE


def _stored(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the weights that accelerate's hooks read for offloaded layers, by their names in the model."""
    hooks = (device_hook_of(module) for module in model.modules())
    maps = (getattr(hook, "weights_map", None) for hook in hooks if getattr(hook, "offload", False))
    return next(weights.dataset for weights in maps if weights is not None)
