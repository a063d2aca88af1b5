"""What transformers and accelerate know of a model and have no public names for."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of the attention implementation that the decoder uses; there is a public setter only."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def can_replace_attention(model: PreTrainedModel) -> bool:
    """Whether the attention implementation can be set; setting it elsewhere only logs a warning."""
    return model._can_set_attn_implementation()


def model_from_config(kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model with random weights of its class, which may be in no Auto class."""
    return kind._from_config(config, dtype=dtype)


def arguments_of_any_device(model: PreTrainedModel) -> Iterable[str]:
    """Names of the forward arguments that the hooks of a device map leave where they are."""
    return model._skip_keys_device_placement or ()


def device_hook_of(module: nn.Module) -> Any:
    """Return the hook that accelerate placed on a module for a device map, or ``None``."""
    return getattr(module, "_hf_hook", None)
