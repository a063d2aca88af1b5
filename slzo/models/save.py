"""Save a model to a folder, including a model that was quantized on loading."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from slzo.models.loading_check import reason_of
from slzo.models.quantization import method_of
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save config, weights and tokenizer. Quantized weights stay quantized.

    Raises:
        OSError: The folder cannot be written.
        SlzoError: transformers refuses to write the model's config.
    """
    try:
        # transformers cannot convert quantized tensors back to the original file format
        model.save_pretrained(folder, save_original_format=method_of(model) is None)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if isinstance(error, SafetensorError) or type(error) is Exception:  # tokenizers raises plain ones
            raise OSError(str(error)) from error
        if isinstance(error, StrictDataclassError):  # transformers loads some configs that it refuses to save
            raise SlzoError(
                f"output: transformers cannot write this model ({reason_of(error)}); correct the config.json of the base model, "
                "or use --format delta"
            ) from error
        raise
    for weights in folder.glob("*.safetensors"):  # safetensors makes files that only their owner can read
        shutil.copymode(folder / "config.json", weights)


def leave_unquantized(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """List modules, given by path, in a quantized model's config as unquantized, so that the model loads as it was saved.

    Raises:
        SlzoError: The quantization has no such list.
    """
    config: Any = model.config.quantization_config
    field = next((name for name in _SKIP_LISTS if hasattr(config, name)), None)
    if field is None:
        raise SlzoError(
            f"output: a {type(config).__name__} cannot exclude layers, so the tuned model cannot be saved; tune the unquantized "
            "model, if you have it"
        )
    from transformers.quantizers.base import get_keys_to_not_convert  # loads the packages of all quantizations

    known = getattr(config, field)
    # without a list, transformers keeps only the head in full precision
    setattr(config, field, [*(get_keys_to_not_convert(model) if known is None else known), *paths])
