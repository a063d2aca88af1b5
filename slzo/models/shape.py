"""Sizes of a model from its config, without loading weights: a skeleton on the meta device, and the size of its files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from slzo.models.decoder_layers import find_decoder_layers
from slzo.models.load import auto_class, load_config, resolve_model
from slzo.models.loading_check import reason_of
from slzo.models.original_weights import OriginalWeights
from slzo.models.quantization import PRESETS, Quantization, method_of_config
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """Widths and parameter counts of a model, and the format of its files.

    Attributes:
        num_layers: Number of decoder layers.
        hidden: Width of the hidden states.
        inner: Widest output of a linear map in a layer, usually of the MLP.
        vocabulary: Vocabulary size.
        linear: Number of parameters in the linear maps of a layer, which quantization changes.
        layer_rest: Number of other parameters of a layer.
        key_values: Values per token in the key-value cache of a layer, keys and values together; 0 if unknown.
        outside: Number of parameters outside the layers; tied parameters count once.
        stored_bytes: Size of the weight files; ``None`` if there are none yet.
        stored_dtype: Type of the stored values; ``None`` if unknown.
        stored_method: Quantization method of the files; ``None`` if they are not quantized.
    """

    num_layers: int
    hidden: int
    inner: int
    vocabulary: int
    linear: int
    layer_rest: int
    outside: int
    key_values: int
    stored_bytes: int | None = None
    stored_dtype: torch.dtype | None = None
    stored_method: str | None = None

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.outside + self.num_layers * (self.linear + self.layer_rest)

    def weight_bytes(self, dtype: torch.dtype, quantization: Quantization | None, full_layers: int = 0) -> int:
        """Return the bytes of the weights with ``full_layers`` layers in full precision; unknown quantizations count 8 bits."""
        if self.stored_method is not None:
            return (self.stored_bytes or 0) + full_layers * self.linear * dtype.itemsize
        full = full_layers if quantization is not None else self.num_layers
        rest = (self.outside + self.num_layers * self.layer_rest) * dtype.itemsize
        preset = PRESETS.get(quantization) if isinstance(quantization, str) else None
        bits = 8.0 if preset is None else preset.bits
        quantized = (self.num_layers - full) * self.linear * bits / 8
        return int(rest + quantized + full * self.linear * dtype.itemsize)


def model_shape(name: str, trust_remote_code: bool = False) -> tuple[ModelShape, PreTrainedModel]:
    """Return the shape of a model and its skeleton on the meta device; for names see :func:`slzo.models.load.resolve_model`.

    Raises:
        SlzoError: The config cannot be read, or is not that of a decoder-only language model.
    """
    config = load_config(name, trust_remote_code)
    skeleton = skeleton_of(config, trust_remote_code)
    quantized = getattr(config, "quantization_config", None)
    files = OriginalWeights(resolve_model(name), skeleton.base_model_prefix)
    shape = replace(
        shape_of(skeleton),
        stored_bytes=files.num_bytes or None,
        stored_dtype=files.dtype,
        stored_method=None if quantized is None else method_of_config(quantized),
    )
    return shape, skeleton


def skeleton_of(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Make a model without values.

    Raises:
        SlzoError: The config is not that of a causal language model.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code).eval()
        model.tie_weights()
        return model
    except Exception as error:  # transformers raises whatever its code meets in a broken config
        raise SlzoError(
            f"model.model {config.name_or_path!r}: no model can be made from its config ({reason_of(error, config)}); correct "
            "its config.json"
        ) from error


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Return the shape of a model or skeleton; sizes of a layer are averages over the layers."""
    _, layers = find_decoder_layers(model)
    config = model.config.get_text_config(decoder=True)
    maps = [module for module in layers.modules() if isinstance(module, nn.Linear | Conv1D)]
    in_layers, linear = _count(layers), _count(nn.ModuleList(maps))
    widths = [module.weight.shape[0 if isinstance(module, nn.Linear) else 1] for module in maps]
    count = len(layers)
    return ModelShape(
        num_layers=count,
        hidden=config.hidden_size,
        inner=max(widths),
        vocabulary=config.vocab_size,
        linear=linear // count,
        layer_rest=(in_layers - linear) // count,
        outside=_count(model) - in_layers,
        key_values=_key_values(config, layers),
    )


def _key_values(config: PretrainedConfig, layers: nn.ModuleList) -> int:
    try:
        heads = getattr(config, "num_attention_heads", None)
        key_value_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None)
    except RuntimeError:  # transformers raises this for numbers that differ between layers, as in Gemma 4
        maps = [module for name, module in layers.named_modules() if name.endswith(".k_proj")]
        return 2 * sum(module.weight.shape[0] for module in maps) // len(layers)
    if not (isinstance(heads, int) and isinstance(key_value_heads, int) and heads > 0):  # no attention, or a list
        return 0
    return int(2 * key_value_heads * (size or config.hidden_size // heads))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
