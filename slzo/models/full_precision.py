"""Layers of a quantized model in full precision: their linear maps are exchanged, and can be put back."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from slzo.models.original_weights import OriginalWeights
from slzo.models.quantization import is_plain
from slzo.utils.errors import SlzoError

_ROWS_AT_ONCE = 1024
_ROWS_COMPARED = 8
# Rounding to 4 bits moves a row by about 0.1 of its length; two rows that have nothing to do with each other differ by 1.4.
_SAME_WEIGHT = 0.5


@dataclass(frozen=True)
class FullPrecision:
    """What was exchanged.

    Attributes:
        quantized: The quantized modules by path; empty if there were none.
        source: Where the values are from, in words.
        dequantized: Whether the model's own files did not hold some of them.
    """

    quantized: Mapping[str, nn.Module]
    source: str
    dequantized: bool = False

    @classmethod
    @torch.no_grad()
    def make(cls, model: PreTrainedModel, paths: Sequence[str]) -> Self:
        """Put the modules below some paths in full precision, from the model's own files if they hold it, else dequantized.

        Raises:
            SlzoError: One is of a kind that cannot be dequantized; the model is as it was.
        """
        originals = OriginalWeights.of(model)
        plain, replaced, dequantized = {}, {}, False
        for path, module, twin in quantized_modules(model, paths):
            if not isinstance(twin, nn.Linear | Conv1D):
                raise SlzoError(
                    f"model.quantization: {path} is a quantized {type(module).__name__}, which cannot be tuned; let the config "
                    "leave it out (modules_to_not_convert, or llm_int8_skip_modules), or set another model.layer"
                )
            device = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
            own = copy.deepcopy(twin).to_empty(device=device).to(model.dtype)
            found = _original(originals, path, own, module)
            dequantized |= not found
            if not found:
                _dequantize(module, own)
            plain[path], replaced[path] = own.eval().requires_grad_(False), module
        for path, own in plain.items():
            model.set_submodule(path, own)
        source = "dequantized" if dequantized else f"its original weights in {originals.source}"
        return cls(replaced, source, dequantized)

    def undo(self, model: PreTrainedModel) -> None:
        """Put the quantized modules back."""
        for path, module in self.quantized.items():
            model.set_submodule(path, module)


def quantized_modules(
    model: PreTrainedModel, paths: Sequence[str] | None = None
) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Path, module, and the module that a plain model of the same config has there, without values; below ``paths`` only."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"), no_init_weights():
        skeleton = type(model)(config)
    for path, twin in skeleton.named_modules():
        own = dict(twin.named_parameters(recurse=False))
        inside = paths is None or any(path == start or path.startswith(f"{start}.") for start in paths)
        if own and inside:
            module = model.get_submodule(path)
            tensors = {name: getattr(module, name, None) for name in own}
            if not all(is_plain(found) and found.shape == own[name].shape for name, found in tensors.items()):
                yield path, module, twin


def _original(originals: OriginalWeights, path: str, own: nn.Linear | Conv1D, module: nn.Module) -> bool:
    """Fill a module from the model's files; whether they hold its tensors, and these are what was quantized."""
    tensors = {}
    for name, parameter in own.named_parameters():
        tensor = originals.read(f"{path}.{name}", parameter.shape)
        if tensor is None:
            return False
        tensors[name] = tensor
    for name, parameter in own.named_parameters():
        parameter.copy_(tensors[name])
    inputs, _ = _sizes(own)
    rows = torch.linspace(0, inputs - 1, min(_ROWS_COMPARED, inputs), dtype=torch.float64).long()
    unit = torch.zeros(len(rows), inputs, dtype=own.weight.dtype).to(own.weight.device)
    unit[torch.arange(len(rows)), rows] = 1.0
    expected, found = (part(unit).float() for part in (own, module))
    return bool((found - expected).norm() <= _SAME_WEIGHT * expected.norm())


def _dequantize(module: nn.Module, own: nn.Linear | Conv1D) -> None:
    """Fill a module with what a quantized one computes for each unit vector, and for zero."""
    inputs, outputs = _sizes(own)
    device, dtype = own.weight.device, own.weight.dtype
    bias = module(torch.zeros(1, inputs, device=device, dtype=dtype))[0]
    columns = torch.empty(inputs, outputs, device=device, dtype=dtype)
    for start in range(0, inputs, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, inputs)
        unit = torch.zeros(stop - start, inputs, device=device, dtype=dtype)
        unit[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        columns[start:stop] = module(unit) - bias
    own.weight.copy_(columns if isinstance(own, Conv1D) else columns.T)
    if own.bias is not None:
        own.bias.copy_(bias)


def _sizes(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs."""
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)
