"""The sizes of a model from its config, without its weights: a skeleton on no device, and how large its files are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from slzo.models.load import auto_class, load_config, resolve_model
from slzo.models.original_weights import OriginalWeights
from slzo.models.parts import find_decoder_layers
from slzo.models.quantization import PRESETS, Quantization, method_of_config
from slzo.utils.errors import SlzoError


@dataclass(frozen=True)
class ModelShape:
    """Numbers of parameters and widths; bytes are of the stored files.

    Attributes:
        num_layers: Decoder layers.
        hidden: Width of the hidden states.
        inner: Widest output of a linear map in a layer, of the MLP as a rule.
        vocabulary: Tokens that it knows.
        linear: Parameters in the linear maps of a layer: what a quantization changes.
        layer_rest: Other parameters of a layer.
        key_values: Values that a layer's attention keeps for each token, keys and values together; 0 where it is not known.
        outside: Parameters outside of the layers, tied ones once.
        stored_bytes: Size of the weight files; ``None`` where there are none yet.
        stored_dtype: Type of their values; ``None`` where it is not known.
        stored_method: How they are quantized; ``None`` if they are not.
    """

    num_layers: int
    hidden: int
    inner: int
    vocabulary: int
    linear: int
    layer_rest: int
    outside: int
    key_values: int = 0
    stored_bytes: int | None = None
    stored_dtype: torch.dtype | None = None
    stored_method: str | None = None

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return self.outside + self.num_layers * (self.linear + self.layer_rest)

    def weight_bytes(self, dtype: torch.dtype, quantization: Quantization | None, full_layers: int = 0) -> int:
        """Memory of the weights with so many layers in full precision; a quantization that slzo does not know counts 8 bits."""
        rest = (self.outside + self.num_layers * self.layer_rest) * dtype.itemsize
        full = full_layers if quantization is not None or self.stored_method is not None else self.num_layers
        if self.stored_method is not None:
            stored = self.stored_bytes or 0
            return stored + full_layers * self.linear * dtype.itemsize
        preset = PRESETS.get(quantization) if isinstance(quantization, str) else None
        bits = 8.0 if preset is None else preset.bits
        quantized = (self.num_layers - full) * self.linear * bits / 8
        return int(rest + quantized + full * self.linear * dtype.itemsize)


def model_shape(name: str, trust_remote_code: bool = False) -> tuple[ModelShape, PreTrainedModel]:
    """The shape of a model by its name, see :func:`slzo.models.load.resolve_model`, and a skeleton of it on the meta device.

    Raises:
        SlzoError: Its config cannot be read, or is none of a decoder-only language model.
    """
    config = load_config(name, trust_remote_code)
    skeleton = skeleton_of(config, trust_remote_code)
    quantized = getattr(config, "quantization_config", None)
    where = resolve_model(name)
    files = OriginalWeights(where, skeleton.base_model_prefix)
    return (
        shape_of(
            skeleton,
            files.num_bytes or None,
            files.dtype,
            None if quantized is None else method_of_config(quantized),
        ),
        skeleton,
    )


def skeleton_of(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without values.

    Raises:
        SlzoError: The config is none of a causal language model.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code).eval()
        model.tie_weights()
        return model
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise SlzoError(f"model.model: no model can be made of its config ({' '.join(str(error).split())})") from error


def shape_of(
    model: PreTrainedModel,
    stored_bytes: int | None = None,
    stored_dtype: torch.dtype | None = None,
    stored_method: str | None = None,
) -> ModelShape:
    """The shape of a model or skeleton; the layers count as equal."""
    _, layers = find_decoder_layers(model)
    config = model.config.get_text_config(decoder=True)
    maps = [[m for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)] for layer in layers]
    in_layers, linear = _count(layers), _count([each for own in maps for each in own])
    widths = [max(m.weight.shape[0 if isinstance(m, nn.Linear) else 1] for m in own) for own in maps]
    count = len(layers)
    return ModelShape(
        num_layers=count,
        hidden=config.hidden_size,
        inner=max(widths),
        vocabulary=config.vocab_size,
        linear=linear // count,
        layer_rest=(in_layers - linear) // count,
        outside=_count([model]) - in_layers,
        key_values=_key_values(config),
        stored_bytes=stored_bytes,
        stored_dtype=stored_dtype,
        stored_method=stored_method,
    )


def _key_values(config: PretrainedConfig) -> int:
    try:
        heads = getattr(config, "num_attention_heads", None)
        own = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None)
    except RuntimeError:  # how transformers refuses a number that differs from layer to layer, as in Gemma 4
        return 0
    if not (isinstance(heads, int) and isinstance(own, int) and heads > 0):  # no attention, or a list
        return 0
    return int(2 * own * (size or config.hidden_size // heads))


def _count(modules: Sequence[nn.Module] | nn.ModuleList) -> int:
    own = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(own.values())
