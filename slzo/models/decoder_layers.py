"""Find the decoder layers of any Hugging Face model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn

from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the decoder layers.

    Raises:
        SlzoError: The model does not have exactly one list of ``num_hidden_layers`` layers.
    """
    config = model.config.get_text_config(decoder=True)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", None)
    ]
    # a list within a layer (experts, adapters) can have the same length by chance; keep the outermost lists
    lists = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(lists) > 1:  # an image encoder has as many layers as the text decoder
        decoder = model.get_decoder()
        inside = next((f"{name}." for name, module in model.named_modules() if module is decoder), "")
        lists = [(name, module) for name, module in lists if name.startswith(inside)]
    if getattr(config, "is_encoder_decoder", False) or len(lists) != 1:
        raise refusal(
            model,
            f"expected a decoder-only language model with one list of decoder layers, found {len(lists)} such lists",
        )
    if model.get_output_embeddings() is None:
        raise refusal(model, "it has no language-model head")
    return lists[0]


def decoder_of(model: PreTrainedModel, layers_path: str) -> tuple[str, str]:
    """Return the path of the innermost module that contains the layers and takes token ids, and the layers' path in it."""
    steps = layers_path.split(".")
    for depth in range(len(steps) - 1, 0, -1):
        path = ".".join(steps[:depth])
        if "input_ids" in inspect.signature(model.get_submodule(path).forward).parameters:
            return path, ".".join(steps[depth:])
    raise refusal(model, "no module around the decoder layers, other than the whole model, takes token ids")


def refusal(model: PreTrainedModel, reason: str) -> SlzoError:
    """Return the error for a model that cannot be run in parts."""
    return SlzoError(
        f"model.model: architecture {type(model).__name__} is not supported: {reason}; use a causal language model such as "
        "Llama, Qwen, Mistral, OPT, GPT-2, GPT-NeoX, Gemma or Phi-3 (docs/families.md lists those that work)"
    )


def layer_of(name: str, path: str) -> int | None:
    """Return the decoder layer that a tensor is in, given by its name; ``None`` outside of the layers at ``path``."""
    number = name.removeprefix(f"{path}.").partition(".")[0]
    return int(number) if name.startswith(f"{path}.") and number.isdecimal() else None
