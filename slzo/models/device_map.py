"""Device of each decoder layer: as ``model.device_map`` says, or as accelerate infers from the free memory.

Every step needs embeddings, final norm and head. They stay on the main device, with the rows and the tuned layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slzo.models.decoder_layers import find_decoder_layers, layer_of
from slzo.models.engine import Engine
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded
from slzo.utils.runtime import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DeviceMap = str | dict[str, Any]
"""``auto``, ``balanced`` or ``sequential``, or a mapping of module names to devices (a number, ``cpu``, ``disk``)."""

DISK = "disk"
AUTOMATIC = ("auto", "balanced", "sequential")
# Default for the memory that a run takes in addition to the frozen weights: activations and tuned tensors.
_RESERVED = 2**30
# Usable share of a GPU's free memory, as in accelerate: the rest is lost to fragmentation.
_USABLE = 0.9


@dataclass(frozen=True)
class LayerDevices:
    """The device of each decoder layer.

    Attributes:
        path: Path of the list of layers in the model.
        main: Device of everything else, such as ``cpu`` or ``cuda:0``.
        places: Device of each layer, or ``disk``.
    """

    path: str
    main: str
    places: tuple[str, ...]

    @property
    def away(self) -> list[int]:
        """Numbers of the layers that are not on the main device."""
        return [number for number, place in enumerate(self.places) if place != self.main]

    @property
    def offloaded(self) -> list[int]:
        """Numbers of the layers whose weights are copied to the main device for each run, from disk or from CPU memory."""
        return [number for number in self.away if self.places[number] in (DISK, "cpu")]

    @property
    def elsewhere(self) -> list[int]:
        """Numbers of the layers that run on another GPU."""
        return sorted(set(self.away) - set(self.offloaded))

    def of_modules(self, model: nn.Module) -> dict[str, str]:
        """Return the map for ``from_pretrained``: a device for every tensor, without an entry around the layers."""
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        outside = {}
        for name in (name for name, _ in tensors if layer_of(name, self.path) is None):
            owner = name.rpartition(".")[0]
            contains_layers = not owner or self.path.startswith(f"{owner}.")
            outside[name if contains_layers else owner] = self.main
        return outside | {f"{self.path}.{number}": place for number, place in enumerate(self.places)}

    def describe(self) -> str:
        """Return a summary such as ``layers 0 to 3 on cpu, 4 to 29 on disk``."""
        ranges, start = [], 0
        for place, run in groupby(self.places):
            stop = start + len(list(run)) - 1
            ranges.append(f"{start} to {stop} on {place}" if stop > start else f"{start} on {place}")
            start = stop + 1
        return "layers " + ", ".join(ranges)


@dataclass(frozen=True)
class DeviceMapOptions:
    """The options ``model.device_map`` and ``model.offload_folder``.

    Attributes:
        device_map: Value of the option; see :data:`DeviceMap`.
        offload_folder: Folder for layers on disk that cannot be read directly from the model's files.
        reserved: Bytes on the main device that the run needs in addition to the frozen weights.

    Raises:
        SlzoError: A value is not allowed.
    """

    device_map: DeviceMap
    offload_folder: str | None = None
    reserved: int = _RESERVED

    @classmethod
    def of(
        cls, device_map: DeviceMap | None, offload_folder: str | None, engine: Engine, quantization: Any
    ) -> DeviceMapOptions | None:
        """Check the options against each other; return ``None`` if there is no device map.

        Raises:
            SlzoError: Options exclude each other.
        """
        if device_map is None:
            if offload_folder is not None:
                raise SlzoError(
                    f"model.offload_folder {offload_folder!r}: is used only with model.device_map; give both"
                )
            return None
        options = cls(device_map, offload_folder)
        others = {
            "model.engine.paired false": engine.paired is False,
            f"model.quantization {quantization}": quantization is not None,
        }
        if wrong := next((option for option, given in others.items() if given), None):
            raise SlzoError(f"model.device_map {device_map!r}: cannot be combined with {wrong}; leave one out")
        return options

    def __post_init__(self) -> None:
        given = self.device_map
        values = given.values() if isinstance(given, dict) else ()
        if given not in AUTOMATIC if isinstance(given, str) else not given:
            raise SlzoError(
                f"model.device_map {given!r}: choose one of {', '.join(AUTOMATIC)}, or give a device (a number, cpu, disk) by "
                "module name"
            )
        if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int | str)]:
            raise SlzoError(f"model.device_map {wrong[0]!r}: not a device; give a number, cpu or disk")

    def check_processes(self, count: int) -> None:
        """Check that the run has a single process.

        Raises:
            SlzoError: It has more.
        """
        if count > 1:
            raise SlzoError(
                f"model.device_map {self.device_map!r}: works only in one process, and this run has {count}; set "
                "trainer.devices to 1 (one process uses all GPUs of the map), or leave the map out"
            )

    def folder(self) -> tempfile.TemporaryDirectory[str] | None:
        """Create a temporary folder in the offload folder, deleted with the returned object; ``None`` without one.

        Raises:
            SlzoError: The offload folder cannot be written.
        """
        if self.offload_folder is None:
            return None
        try:
            folder = expanded(self.offload_folder)
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryDirectory(prefix="layers-", dir=folder)
        except OSError as error:
            raise SlzoError(
                f"model.offload_folder {self.offload_folder!r}: cannot be written ({error.strerror or error}); give "
                "another folder"
            ) from error

    def places(self, skeleton: PreTrainedModel, main: torch.device) -> LayerDevices:
        """Choose the device of each layer.

        Args:
            skeleton: The model without values, in the dtype that it is loaded in.
            main: Device of the rows, the embeddings, the head and the tuned layer.

        Raises:
            SlzoError: The model has no such module, a device does not exist, or the map splits a layer.
        """
        path, layers = find_decoder_layers(skeleton)
        home = str(main) if main.type == "cpu" or main.index is not None else f"{main.type}:0"
        if isinstance(self.device_map, str):
            taken = self.reserved + _num_bytes(skeleton) - _num_bytes(layers)
            inferred = _infer_places(self.device_map, layers, main, taken)
            named = {f"{path}.{name}": place for name, place in inferred.items()}
        else:
            named = {name: self._place(value, main) for name, value in self.device_map.items()}
            self._check_names(named, skeleton, path, home)
        return LayerDevices(
            path, home, tuple(_lookup(f"{path}.{number}", named, home) for number in range(len(layers)))
        )

    def _place(self, value: int | str, main: torch.device) -> str:
        device_type = main.type if main.type != "cpu" else "cuda"
        name = f"{device_type}:{value}" if isinstance(value, int) or value.isdecimal() else value
        name = f"{name}:0" if name == device_type else name
        # a trainer on the CPU does not use any GPU
        cards = [f"{device_type}:{number}" for number in range(_num_cards(main))]
        if name not in (known := ["cpu", DISK, *cards]):
            raise SlzoError(
                f"model.device_map {value!r}: no such device for a run on {main.type}; choose one of {', '.join(known)}"
            )
        return name

    def _check_names(self, named: Mapping[str, str], skeleton: PreTrainedModel, path: str, main: str) -> None:
        known = {name for name, _ in (*skeleton.named_modules(), *skeleton.named_parameters())}
        for name, place in named.items():
            if name not in known:
                last = len(find_decoder_layers(skeleton)[1]) - 1
                raise SlzoError(
                    f"model.device_map {name!r}: the model has no such module; its decoder layers are {path}.0 to {path}.{last}"
                )
            layer = layer_of(name, path)
            if layer is not None and place != _lookup(f"{path}.{layer}", named, main):
                raise SlzoError(
                    f"model.device_map {name!r}: splits decoder layer {layer}; give one device for {path}.{layer}"
                )
            contains_layers = not name or f"{path}.".startswith(f"{name}.")
            if layer is None and not contains_layers and place != main:
                raise SlzoError(
                    f"model.device_map {name!r}: is needed at every step and stays on {main}; put only decoder layers on {place}"
                )


def _lookup(name: str, named: Mapping[str, str], default: str) -> str:
    """Return the entry of a module, or of the innermost module that contains it."""
    containing = [each for each in named if not each or name == each or name.startswith(f"{each}.")]
    return named[max(containing, key=len)] if containing else default


def _infer_places(strategy: str, layers: nn.ModuleList, main: torch.device, taken: int) -> dict[str, str]:
    """Fill the main device, of which ``taken`` bytes are in use, then other GPUs, CPU memory and disk; return places by layer."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    cards = range(_num_cards(main))
    room: dict[int | str, int] = {
        number: int(_USABLE * (free_bytes(torch.device(main.type, number)) or 0)) for number in cards
    }
    room["cpu"] = free_bytes(torch.device("cpu")) or 0
    first = "cpu" if main.type == "cpu" else main.index or 0
    room[first] = max(0, room[first] - taken)
    classes = sorted({type(layer).__name__ for layer in layers})
    if strategy != "sequential" and len(cards) > 1:
        room = get_balanced_memory(layers, max_memory=room, no_split_module_classes=classes)
    inferred = infer_auto_device_map(layers, max_memory=room, no_split_module_classes=classes, clean_result=False)
    return {name: f"{main.type}:{place}" if isinstance(place, int) else str(place) for name, place in inferred.items()}


def _num_cards(main: torch.device) -> int:
    return torch.cuda.device_count() if main.type == "cuda" else 0


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
