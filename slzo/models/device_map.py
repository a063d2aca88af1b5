"""Which device each decoder layer goes to: what ``model.device_map`` says, or what fits, by accelerate's rules.

Embeddings, final norm and head are needed at every step and stay on the main device, where rows and tuned layer are.
"""

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slzo.models.engine import Engine
from slzo.models.parts import find_decoder_layers
from slzo.utils.errors import SlzoError
from slzo.utils.runtime import free_bytes

DeviceMap = str | dict[str, Any]
"""``auto``, ``balanced`` or ``sequential``, or a device (a number, ``cpu``, ``disk``) by module name."""

DISK = "disk"
AUTOMATIC = ("auto", "balanced", "sequential")
# Where nothing says what a run takes beside the weights: activations and what is tuned.
_RESERVED = 2**30
# Of a card's free memory, as accelerate counts: the rest goes to fragments.
_USABLE = 0.9


@dataclass(frozen=True)
class LayerPlaces:
    """Where each decoder layer lies.

    Attributes:
        path: Of the list of layers in the model.
        main: The device of everything else, like ``cpu`` or ``cuda:0``.
        places: For each layer a device, or ``disk``.
    """

    path: str
    main: str
    places: tuple[str, ...]

    @property
    def away(self) -> list[int]:
        """Layers that are not on the main device."""
        return [number for number, place in enumerate(self.places) if place != self.main]

    @property
    def offloaded(self) -> list[int]:
        """Layers whose weights come to the main device each time they run: those on disk, or in memory beside a card."""
        return [number for number in self.away if self.places[number] in (DISK, "cpu")]

    @property
    def elsewhere(self) -> list[int]:
        """Layers that run on another card."""
        return sorted(set(self.away) - set(self.offloaded))

    def of_modules(self, model: nn.Module) -> dict[str, str]:
        """What ``from_pretrained`` takes: a place for every module, none of them within another."""
        found: dict[str, str] = {}
        _outside(model, "", self.path, self.main, found)
        return found | {f"{self.path}.{number}": place for number, place in enumerate(self.places)}

    def describe(self) -> str:
        """Like ``layers 0 to 3 on cpu, 4 to 29 on disk``."""
        words, start = [], 0
        for place, run in groupby(self.places):
            stop = start + len(list(run)) - 1
            words.append(f"{start} to {stop} on {place}" if stop > start else f"{start} on {place}")
            start = stop + 1
        return "layers " + ", ".join(words)


@dataclass(frozen=True)
class DeviceMapChoice:
    """The options ``model.device_map`` and ``model.offload_folder``.

    Attributes:
        device_map: See :data:`DeviceMap`.
        offload_folder: Where layers on disk are written that the model's files do not hold as they are.
        reserved: Bytes of the main device that the run takes beside the frozen weights.

    Raises:
        SlzoError: A value is not allowed, or accelerate is missing.
    """

    device_map: DeviceMap
    offload_folder: str | None = None
    reserved: int = _RESERVED

    @classmethod
    def of(
        cls, device_map: DeviceMap | None, offload_folder: str | None, engine: Engine, quantization: Any
    ) -> "DeviceMapChoice | None":
        """The choice, checked against other options; ``None`` where there is none.

        Raises:
            SlzoError: They do not go together.
        """
        if device_map is None:
            if offload_folder is not None:
                raise SlzoError(
                    f"model.offload_folder {offload_folder!r}: is used with model.device_map only; give both"
                )
            return None
        choice = cls(device_map, offload_folder)
        others = {
            "model.engine.compile true": engine.compile,
            "model.engine.paired false": engine.paired is False,
            f"model.quantization {quantization}": quantization is not None,
        }
        if wrong := next((option for option, given in others.items() if given), None):
            raise SlzoError(f"model.device_map {device_map!r}: does not go together with {wrong}; leave one out")
        return choice

    def __post_init__(self) -> None:
        given = self.device_map
        values = given.values() if isinstance(given, dict) else ()
        if given not in AUTOMATIC if isinstance(given, str) else not given:
            raise SlzoError(
                f"model.device_map {given!r}: choose one of {', '.join(AUTOMATIC)}, or give a device (a number, cpu, disk) by "
                "module name"
            )
        if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int | str)]:
            raise SlzoError(f"model.device_map {wrong[0]!r}: is no device; give a number, cpu or disk")
        if importlib.util.find_spec("accelerate") is None:
            raise SlzoError("model.device_map: needs accelerate, which is not installed; run: pip install accelerate")

    def check_processes(self, count: int) -> None:
        """Refuse a run of several processes.

        Raises:
            SlzoError: It is one.
        """
        if count > 1:
            raise SlzoError(
                f"model.device_map {self.device_map!r}: is for one process, and this run has {count}; set trainer.devices to 1 "
                "(one process uses all cards of the map), or leave the map out"
            )

    def folder(self) -> "tempfile.TemporaryDirectory[str] | None":
        """A folder of its own in the offload folder, which is gone with the object; ``None`` without one.

        Raises:
            SlzoError: It cannot be written.
        """
        if self.offload_folder is None:
            return None
        try:
            Path(self.offload_folder).mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryDirectory(prefix="layers-", dir=self.offload_folder)
        except OSError as error:
            raise SlzoError(
                f"model.offload_folder {self.offload_folder!r}: cannot be written ({error.strerror or error}); give another"
            ) from error

    def places(self, skeleton: PreTrainedModel, main: torch.device) -> LayerPlaces:
        """The place of each layer.

        Args:
            skeleton: The model, of the type that it is loaded in; without values.
            main: Where rows, embeddings, head and the tuned layer are.

        Raises:
            SlzoError: A name is none of the model, a device does not exist, or the map splits a layer.
        """
        path, layers = find_decoder_layers(skeleton)
        if isinstance(self.device_map, str):
            outside = _num_bytes(skeleton) - _num_bytes(layers)
            return LayerPlaces(path, _name(main), _that_fit(self.device_map, layers, main, self.reserved + outside))
        named = {name: self._place(value, main) for name, value in self.device_map.items()}
        self._check_names(named, skeleton, path, _name(main))
        found = [_of_longest_name(f"{path}.{number}", named, _name(main)) for number in range(len(layers))]
        return LayerPlaces(path, _name(main), tuple(found))

    def _place(self, value: int | str, main: torch.device) -> str:
        kind = main.type if main.type != "cpu" else "cuda"
        name = f"{kind}:{value}" if isinstance(value, int) or value.isdecimal() else value
        name = f"{name}:0" if name == kind else name
        # beside a trainer on the CPU a card is none of the run's
        cards = [f"{kind}:{number}" for number in range(_num_cards(main))]
        if name not in (known := ["cpu", DISK, *cards]):
            raise SlzoError(
                f"model.device_map {value!r}: no such device for a run on {main.type}; choose one of {', '.join(known)}"
            )
        return name

    def _check_names(self, named: Mapping[str, str], skeleton: nn.Module, path: str, main: str) -> None:
        known = {name for name, _ in (*skeleton.named_modules(), *skeleton.named_parameters())}
        for name, place in named.items():
            if name not in known:
                last = len(skeleton.get_submodule(path)) - 1  # type: ignore[arg-type]
                raise SlzoError(
                    f"model.device_map {name!r}: the model has no such module; its decoder layers are {path}.0 to {path}.{last}"
                )
            layer, _, inside = name.removeprefix(f"{path}.").partition(".")
            if name.startswith(f"{path}.") and inside:
                if place != _of_longest_name(f"{path}.{layer}", named, main):
                    raise SlzoError(
                        f"model.device_map {name!r}: splits decoder layer {layer}; give the place of {path}.{layer} as a whole"
                    )
            elif not f"{path}.".startswith(f"{name}." if name else "") and not name.startswith(path) and place != main:
                raise SlzoError(
                    f"model.device_map {name!r}: is needed at every step and stays on {main}; put decoder layers on {place}"
                )


def _outside(module: nn.Module, name: str, path: str, main: str, found: dict[str, str]) -> None:
    """Every module and tensor that is outside of the layers, as few as cover all."""
    start = f"{name}." if name else ""
    found |= {f"{start}{own}": main for own, _ in module.named_parameters(recurse=False)}
    found |= {f"{start}{own}": main for own, _ in module.named_buffers(recurse=False)}
    for own, child in module.named_children():
        inner = f"{start}{own}"
        if path.startswith(f"{inner}."):
            _outside(child, inner, path, main, found)
        elif inner != path:
            found[inner] = main


def _of_longest_name(name: str, named: Mapping[str, str], otherwise: str) -> str:
    """The entry of a module, or of the innermost one around it."""
    around = [each for each in named if not each or name == each or name.startswith(f"{each}.")]
    return named[max(around, key=len)] if around else otherwise


def _that_fit(how: str, layers: nn.ModuleList, main: torch.device, taken: int) -> tuple[str, ...]:
    """As many layers as fit on the main device beside what is taken, then on other cards, in memory, and on disk."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    cards = range(_num_cards(main))
    room: dict[int | str, int] = {
        number: int(_USABLE * (free_bytes(torch.device(main.type, number)) or 0)) for number in cards
    }
    room["cpu"] = free_bytes(torch.device("cpu")) or 0
    first = "cpu" if main.type == "cpu" else main.index or 0
    room[first] = max(0, room[first] - taken)
    kinds = sorted({type(layer).__name__ for layer in layers})
    if how != "sequential" and len(cards) > 1:
        room = get_balanced_memory(layers, max_memory=room, no_split_module_classes=kinds)
    found = infer_auto_device_map(layers, max_memory=room, no_split_module_classes=kinds, clean_result=False)
    names = {name: f"{main.type}:{place}" if isinstance(place, int) else str(place) for name, place in found.items()}
    return tuple(_of_longest_name(str(number), names, _name(main)) for number in range(len(layers)))


def _num_cards(main: torch.device) -> int:
    return torch.cuda.device_count() if main.type == "cuda" else 0


def _name(device: torch.device) -> str:
    return str(device) if device.type == "cpu" or device.index is not None else f"{device.type}:0"


def _num_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
