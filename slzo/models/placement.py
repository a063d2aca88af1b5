"""A model whose decoder layers lie on several devices or on disk: accelerate's hooks bring weights and states together.

They run as hooks of torch, one pair a layer: a layer's weights come once for each time it runs, and copies of a layer that share
its weights (views of a part of the model, layers through oneDNN) have them too.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from slzo.models.attention import VIRTUAL_ARGUMENT
from slzo.models.device_map import DISK, DeviceMapChoice, LayerPlaces
from slzo.models.engine import DType
from slzo.models.load import load_model
from slzo.models.shape import model_shape
from slzo.utils.errors import SlzoError


class Placement:
    """The layers of a loaded model that are away from its main device.

    Args:
        model: Its layers are where ``places`` says, those on disk without values.
        places: Of all layers.
        stored: Weights of the layers on disk, by the model's names; read when they are asked for.
        folder: Is kept as long as the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        places: LayerPlaces,
        stored: Mapping[str, Tensor],
        folder: "TemporaryDirectory[str] | None" = None,
    ) -> None:
        self.places = places
        self._layers = model.get_submodule(places.path)
        self._stored = stored
        self._folder = folder
        self._skipped = [*(model._skip_keys_device_placement or ()), VIRTUAL_ARGUMENT]
        self._weights: dict[int, Mapping[str, Tensor]] = {}
        self._handles: dict[int, list[RemovableHandle]] = {}
        for number in places.away:
            self._send_away(number)

    @property
    def offloads(self) -> bool:
        """Whether weights are read or copied at each visit of a layer."""
        return bool(self.places.offloaded)

    @torch.no_grad()
    def bring(self, numbers: Collection[int]) -> None:
        """Have layers on the main device, in memory of their own, until :meth:`give_back`: they are to be changed.

        Raises:
            SlzoError: That is all of them, while some are meant to be away.
        """
        if self.places.away and len(set(numbers)) == len(self.places.places):
            raise SlzoError(
                "model.device_map: some layers are not on the main device, and model.scope tunes all; tune some layers "
                "(LayerScope, OutlierChannels, ActivationSubspace, LoRA), or leave the map out"
            )
        for number in [number for number in numbers if number in self._handles]:
            for handle in self._handles.pop(number):
                handle.remove()
            layer, weights = self._layers.get_submodule(str(number)), self._weights.get(number)
            if weights is None:
                layer.to(self.places.main)
                continue
            for name, tensor in list(layer.named_parameters()):
                own = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.places.main).copy_(weights[name])
                _set(layer, name, nn.Parameter(own, requires_grad=False))

    def give_back(self, numbers: Collection[int]) -> None:
        """Send layers away again, but for those whose values have changed."""
        for number in set(numbers) & set(self.places.away) - self._handles.keys():
            own = dict(self._layers.get_submodule(str(number)).named_parameters())
            weights = self._weights.get(number)
            if weights is None or all(
                name in weights and torch.equal(tensor.cpu(), weights[name].cpu()) for name, tensor in own.items()
            ):
                self._send_away(number)

    def values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Name and values of each of the model's parameters, those that are away one after the other."""
        start = f"{self.places.path}."
        for name, parameter in model.named_parameters():
            number, _, inside = name.removeprefix(start).partition(".")
            yield name, self._weights[int(number)][inside] if parameter.is_meta else parameter

    def _send_away(self, number: int) -> None:
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
            skip_keys=self._skipped,
        )
        hook.init_hook(layer)
        self._handles[number] = [
            layer.register_forward_pre_hook(partial(_before, hook.pre_forward, layer), with_kwargs=True),
            layer.register_forward_hook(partial(_after, hook.post_forward, layer), always_call=True),
        ]


def _before(call: Callable[..., Any], layer: nn.Module, _copy: nn.Module, args: Any, kwargs: Any) -> Any:
    return call(layer, *args, **kwargs)


def _after(call: Callable[..., Any], layer: nn.Module, _copy: nn.Module, _args: Any, output: Any) -> Any:
    return call(layer, output)


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, own = name.rpartition(".")
    module.get_submodule(path)._parameters[own] = parameter


_PLACED: "WeakKeyDictionary[nn.Module, Placement]" = WeakKeyDictionary()


def placement_of(model: nn.Module) -> Placement | None:
    """Where the layers of a model are; ``None`` for one that is on one device."""
    return _PLACED.get(model)


def to_device(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model, but for one whose layers have their places."""
    if placement_of(model) is None:
        model.to(device)  # type: ignore[arg-type]


def values_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each of a model's parameters, wherever they are."""
    placement = placement_of(model)
    return model.named_parameters() if placement is None else placement.values(model)


def load_placed(
    name: str, dtype: DType, trust_remote_code: bool, choice: DeviceMapChoice, main: torch.device
) -> PreTrainedModel:
    """A frozen causal language model whose layers are where a map says; see :func:`slzo.models.load.load_model`.

    ``main`` is that of :meth:`DeviceMapChoice.places`.

    Raises:
        SlzoError: It cannot be loaded like that.
    """
    from accelerate.hooks import remove_hook_from_module

    _, skeleton = model_shape(name, trust_remote_code)
    skeleton.to(getattr(torch, dtype))
    places = choice.places(skeleton, main)
    folder = choice.folder()
    model = load_model(
        name,
        dtype,
        trust_remote_code,
        device_map=places.of_modules(skeleton),
        offload_folder=None if folder is None else folder.name,
    )
    stored = _stored(model) if DISK in places.places else {}
    remove_hook_from_module(model, recurse=True)  # they are one a linear map, and in the way of copies
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # left over: a copy of the module would run the original
    if places.away:
        _PLACED[model] = Placement(model, places, stored, folder)
    return model


def _stored(model: nn.Module) -> Mapping[str, Tensor]:
    """What accelerate's hooks read offloaded weights from, by the model's names."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    maps = (getattr(hook, "weights_map", None) for hook in hooks if getattr(hook, "offload", False))
    return next(found.dataset for found in maps if found is not None)
