"""How a model's frozen layers are quantized: the configs of transformers, by a short name or by class path."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from slzo.utils.errors import SlzoError

Quantization = str | dict[str, Any]
"""A short name, a class path, or ``class_path`` with ``init_args``."""


def _bitsandbytes(kind: str) -> Callable[[torch.dtype], QuantizationConfigMixin]:
    return lambda dtype: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)


def _torchao(name: str) -> Callable[[torch.dtype], QuantizationConfigMixin]:
    return lambda _: TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)())


@dataclass(frozen=True)
class Preset:
    """A quantization that goes by a short name.

    Attributes:
        package: Python package that computes it.
        bits: Bits that a quantized weight takes, its share of the scales included.
        make: The config, from the type that the model computes in.
    """

    package: str
    bits: float
    make: Callable[[torch.dtype], QuantizationConfigMixin]


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "int8": Preset("torchao", 8.0, _torchao("Int8WeightOnlyConfig")),
        "fp8": Preset("torchao", 8.0, _torchao("Float8WeightOnlyConfig")),
        "nf4": Preset("bitsandbytes", 4.5, _bitsandbytes("nf4")),
        "fp4": Preset("bitsandbytes", 4.5, _bitsandbytes("fp4")),
    }
)
_PACKAGES = MappingProxyType({"torchao": "torchao", "bitsandbytes": "bitsandbytes"})


def quantization_config(quantization: Quantization | QuantizationConfigMixin, dtype: torch.dtype) -> Any:
    """The config that a model is loaded with; ``dtype`` is the type that it computes in.

    Raises:
        SlzoError: There is no such quantization, its package is missing, or its arguments are wrong.
    """
    if isinstance(quantization, QuantizationConfigMixin):
        return quantization
    preset = PRESETS.get(quantization) if isinstance(quantization, str) else None
    if preset is not None:
        _needs(preset.package, str(quantization))
        return preset.make(dtype)
    found = _made(quantization if isinstance(quantization, dict) else {"class_path": quantization})
    if not isinstance(found, QuantizationConfigMixin):
        raise _unknown(quantization, f"{type(found).__name__} is no quantization config of transformers")
    return found


def describe_quantization(quantization: Quantization | QuantizationConfigMixin | None) -> Quantization | None:
    """What a checkpoint and its options hold of it: primitives only."""
    if isinstance(quantization, QuantizationConfigMixin):
        return type(quantization).__name__
    return quantization


def method_of(model: PreTrainedModel) -> str | None:
    """The quantization that a model has been loaded with, by transformers' name; ``None`` for a plain one."""
    config = getattr(model.config, "quantization_config", None)
    return None if config is None else method_of_config(config)


def method_of_config(config: Any) -> str:
    """Transformers' name of a quantization config, an object or what ``config.json`` holds of one."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    if method is None and isinstance(config, dict) and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return "bitsandbytes"  # what former versions of transformers wrote
    return str(getattr(method, "value", method))


def missing_package(method: str) -> str | None:
    """How to install what a quantization method needs, if it is not there and slzo knows."""
    if method not in _PACKAGES or importlib.util.find_spec(_PACKAGES[method]) is not None:
        return None
    return f"needs {method}, which is not installed; run: pip install 'slzo[quant-{method}]'"


def is_plain(tensor: Any) -> TypeGuard[Tensor]:
    """Whether a tensor holds its values as they are: floating-point numbers, not those that a quantization packed."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point() and tensor.element_size() > 1


def _needs(package: str, quantization: str) -> None:
    missing = missing_package(package)
    if missing is not None:
        raise SlzoError(f"model.quantization {quantization}: {missing}")


def _made(entry: Mapping[str, Any]) -> Any:
    """The object of a class path and its arguments, those inside of its arguments too."""
    path, arguments = entry.get("class_path"), entry.get("init_args", {})
    if not isinstance(path, str) or not isinstance(arguments, dict) or entry.keys() - {"class_path", "init_args"}:
        raise _unknown(dict(entry), "a mapping holds class_path and init_args")
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module or "transformers"), name)
    except (ImportError, AttributeError, ValueError) as error:
        package = module.partition(".")[0]
        missing = missing_package(package)
        raise _unknown(path, missing or "no such class") from error
    if not inspect.isclass(kind):
        raise _unknown(path, "no class")
    inner = {
        key: _made(value) if isinstance(value, dict) and "class_path" in value else value
        for key, value in arguments.items()
    }
    try:
        return kind(**inner)
    except Exception as error:  # whatever a config says of its arguments
        raise _unknown(path, " ".join(str(error).split()) or type(error).__name__) from error


def _unknown(quantization: Any, reason: str) -> SlzoError:
    return SlzoError(
        f"model.quantization {quantization!r}: {reason}; choose one of {', '.join(PRESETS)}, or give a quantization config of "
        "transformers by class_path and init_args"
    )
