"""Layers of a quantized model in full precision. Their quantized linear maps are replaced, and can be restored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.nn.functional import one_hot
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from slzo.models.original_weights import OriginalWeights
from slzo.models.quantization import is_plain
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS_AT_ONCE = 1024
_ROWS_COMPARED = 8
# Rounding to 4 bits changes a row by about 0.1 of its norm; unrelated rows differ by 1.4.
_SAME_WEIGHT = 0.5


@dataclass(frozen=True)
class FullPrecision:
    """Record of the modules that were replaced.

    Attributes:
        quantized: The quantized modules by path; empty if there were none.
        source: Description of where the full-precision values come from.
        dequantized: Whether values are dequantized because the model's files do not have all originals.
    """

    quantized: Mapping[str, nn.Module]
    source: str
    dequantized: bool

    @classmethod
    @torch.no_grad()
    def make(cls, model: PreTrainedModel, paths: Sequence[str]) -> Self:
        """Replace the modules below some paths by full-precision ones, from the model's own files if possible, else dequantized.

        Raises:
            SlzoError: A module cannot be dequantized; the model is then unchanged.
        """
        originals = OriginalWeights(model.name_or_path or "", model.base_model_prefix)
        plain, replaced, dequantized = {}, {}, False
        for path, module, template in _quantized_modules(model, paths):
            if not isinstance(template, nn.Linear | Conv1D):
                raise SlzoError(
                    f"model.quantization: {path} is a quantized {type(module).__name__}, which cannot be tuned; exclude it in "
                    "the config (modules_to_not_convert, or llm_int8_skip_modules), or set another model.layer"
                )
            device = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
            linear = copy.deepcopy(template).to_empty(device=device).to(model.dtype)
            if not _load_original(originals, path, linear, module):
                _dequantize(module, linear)
                dequantized = True
            plain[path], replaced[path] = linear.eval().requires_grad_(False), module
        for path, linear in plain.items():
            model.set_submodule(path, linear)
        source = "dequantized" if dequantized else f"from the original weights in {originals.source}"
        return cls(replaced, source, dequantized)

    def undo(self, model: PreTrainedModel) -> None:
        """Restore the quantized modules."""
        for path, module in self.quantized.items():
            model.set_submodule(path, module)


def _quantized_modules(model: PreTrainedModel, paths: Sequence[str]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield each quantized module below ``paths``: its path, the module, and its unquantized counterpart without values."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"), no_init_weights():
        skeleton = type(model)(config)
    for path, template in skeleton.named_modules():
        expected = dict(template.named_parameters(recurse=False))
        inside = any(path == start or path.startswith(f"{start}.") for start in paths)
        if expected and inside:
            module = model.get_submodule(path)
            tensors = {name: getattr(module, name, None) for name in expected}
            if not all(is_plain(tensor) and tensor.shape == expected[name].shape for name, tensor in tensors.items()):
                yield path, module, template


def _load_original(originals: OriginalWeights, path: str, linear: nn.Linear | Conv1D, module: nn.Module) -> bool:
    """Fill ``linear`` from the model's files; return whether they have its tensors and these match the quantized module."""
    tensors = {name: originals.read(f"{path}.{name}", value.shape) for name, value in linear.named_parameters()}
    if any(tensor is None for tensor in tensors.values()):
        return False
    linear.load_state_dict(tensors, strict=False)  # a class of its own may have buffers too
    weight = _by_input(linear)
    rows = torch.linspace(0, len(weight) - 1, min(_ROWS_COMPARED, len(weight)), dtype=torch.float64).long()
    unit = one_hot(rows, len(weight)).to(weight)
    expected, actual = weight[rows].float(), _without_bias(module, unit).float()
    return bool((actual - expected).norm() <= _SAME_WEIGHT * expected.norm())


def _dequantize(module: nn.Module, linear: nn.Linear | Conv1D) -> None:
    """Fill ``linear`` with the outputs of the quantized module for each unit vector (weights) and for zero (bias)."""
    weight = _by_input(linear)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = weight[start : start + _ROWS_AT_ONCE]
        unit = weight.new_zeros(len(rows), len(weight))
        unit.diagonal(start).fill_(1)
        rows.copy_(_without_bias(module, unit))
    if linear.bias is not None:
        linear.bias.copy_(module(weight.new_zeros(1, len(weight)))[0])


def _without_bias(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the outputs of a linear map without its bias, in which half precision would round the weights away."""
    owner: Any = module
    bias = getattr(owner, "bias", None)
    owner.bias = None
    try:
        return owner(inputs)
    finally:
        owner.bias = bias


def _by_input(linear: nn.Linear | Conv1D) -> torch.Tensor:
    """Return the weights as a view of shape (inputs, outputs)."""
    return linear.weight if isinstance(linear, Conv1D) else linear.weight.T
