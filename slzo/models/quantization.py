"""Quantization of a model's frozen layers: transformers' configs by a short name or by class path."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from slzo.utils.errors import SlzoError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Quantization = str | dict[str, Any]
"""A short name, a class path, or ``class_path`` with ``init_args``."""


@dataclass(frozen=True)
class Preset:
    """A quantization with a short name.

    Attributes:
        package: Python package that implements it.
        bits: Bits per quantized weight, including its share of the scales.
        kind: Its name there: a type of bitsandbytes, or a class of torchao.
    """

    package: str
    bits: float
    kind: str

    def config(self, dtype: torch.dtype) -> QuantizationConfigMixin:
        """Return the config for a model that computes in ``dtype``."""
        if self.package == "bitsandbytes":
            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=self.kind, bnb_4bit_compute_dtype=dtype)
        return TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), self.kind)())


PRESETS: Mapping[str, Preset] = {
    "int8": Preset("torchao", 8.0, "Int8WeightOnlyConfig"),
    "fp8": Preset("torchao", 8.0, "Float8WeightOnlyConfig"),
    "nf4": Preset("bitsandbytes", 4.5, "nf4"),
    "fp4": Preset("bitsandbytes", 4.5, "fp4"),
}
_PACKAGES = frozenset(preset.package for preset in PRESETS.values())


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """Return the config to load a model with; ``dtype`` is the type that the model computes in.

    Raises:
        SlzoError: The quantization is unknown, its package is missing, or its arguments are wrong.
    """
    preset = PRESETS.get(quantization) if isinstance(quantization, str) else None
    if preset is not None:
        if missing := missing_package(preset.package):
            raise SlzoError(f"model.quantization {quantization}: {missing}")
        return preset.config(dtype)
    config = _instantiate(quantization if isinstance(quantization, dict) else {"class_path": quantization})
    if not isinstance(config, QuantizationConfigMixin):
        raise _error(quantization, f"{type(config).__name__} is not a quantization config of transformers")
    return config


def method_of(model: PreTrainedModel) -> str | None:
    """Return transformers' name of a model's quantization; ``None`` for a plain model."""
    config = getattr(model.config, "quantization_config", None)
    return None if config is None else method_of_config(config)


def method_of_config(config: Any) -> str:
    """Return transformers' name of a quantization config, given as an object or as its dictionary in ``config.json``."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    if method is None and isinstance(config, dict) and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return "bitsandbytes"  # as old versions of transformers wrote it
    return str(getattr(method, "value", method))


def missing_package(method: str) -> str | None:
    """Return how to install the package of a quantization method; ``None`` if it is installed or unknown."""
    if method not in _PACKAGES or importlib.util.find_spec(method) is not None:
        return None
    return f"needs {method}, which is not installed; run: pip install 'slzo[quant-{method}]'"


def is_plain(tensor: Any) -> TypeGuard[Tensor]:
    """Whether a tensor is an ordinary floating-point tensor, not a quantized one."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point() and tensor.element_size() > 1


def _instantiate(entry: Mapping[str, Any]) -> Any:
    """Make the object of a class path and its arguments, which may contain further objects."""
    path, arguments = entry.get("class_path"), entry.get("init_args", {})
    if not isinstance(path, str) or not isinstance(arguments, dict) or entry.keys() - {"class_path", "init_args"}:
        raise _error(dict(entry), "a mapping must have class_path and init_args")
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module or "transformers"), name)
    except (ImportError, AttributeError, ValueError) as error:
        missing = missing_package(module.partition(".")[0])
        raise _error(path, missing or "no such class") from error
    if not inspect.isclass(cls):
        raise _error(path, "not a class")
    inner = {
        key: _instantiate(value) if isinstance(value, dict) and "class_path" in value else value
        for key, value in arguments.items()
    }
    try:
        return cls(**inner)
    except Exception as error:  # configs raise many kinds of errors
        raise _error(path, one_line(error, None)) from error


def _error(quantization: Any, reason: str) -> SlzoError:
    return SlzoError(
        f"model.quantization {quantization!r}: {reason}; choose one of {', '.join(PRESETS)}, or give a quantization config of "
        "transformers by class_path and init_args"
    )
