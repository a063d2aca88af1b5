"""Properties of a model for which transformers and accelerate have no public names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of the attention implementation that the decoder uses; only its setter is public."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def can_replace_attention(model: PreTrainedModel) -> bool:
    """Whether the attention implementation can be set; for other models, setting it only logs a warning."""
    return model._can_set_attn_implementation()


def model_from_config(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model of a class with random weights; the class need not be in an Auto class."""
    return kind._from_config(config, dtype=dtype)


def arguments_of_any_device(model: PreTrainedModel) -> Iterable[str]:
    """Return the names of the forward arguments that the hooks of a device map do not move."""
    return model._skip_keys_device_placement or ()


def device_hook_of(module: nn.Module) -> Any:
    """Return the hook that accelerate placed on a module for a device map, or ``None``."""
    return getattr(module, "_hf_hook", None)


def has_single_layer_sizes(config: PretrainedConfig) -> bool:
    """Whether some sizes of a config are set for single layers."""
    return "_heterogeneity_spec" in vars(config)
