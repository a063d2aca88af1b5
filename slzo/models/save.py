"""Write a model to a folder, also one that was quantized when it was loaded."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from slzo.models.quantization import method_of
from slzo.utils.errors import SlzoError

_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")


def save_model(model: PreTrainedModel, folder: str) -> None:
    """Write config and weights, quantized ones as they are."""
    # what made quantized tensors of the files cannot be undone by transformers
    model.save_pretrained(folder, save_original_format=method_of(model) is None)


def leave_unquantized(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """Write into a quantized model's config that some modules, by path, are in full precision, so that it loads as it is saved.

    Raises:
        SlzoError: Its quantization has no such list.
    """
    config: Any = model.config.quantization_config
    field = next((name for name in _SKIP_LISTS if hasattr(config, name)), None)
    if field is None:
        raise SlzoError(
            f"output: a {type(config).__name__} cannot leave out layers, so the tuned model cannot be saved; tune the model that "
            "was quantized, if you have it"
        )
    known = getattr(config, field)
    # left out, the list stands for the head
    setattr(config, field, [*(get_keys_to_not_convert(model) if known is None else known), *paths])
