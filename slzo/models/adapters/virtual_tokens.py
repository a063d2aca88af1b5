"""Learned keys and values before every sequence, through peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slzo.models.adapters.base import Adapter, import_peft
from slzo.models.attention import VirtualTokens
from slzo.models.peft_files import PeftFiles, prefix_files
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODULE = "slzo_prefix"


@dataclass(frozen=True)
class PrefixTokens(Adapter):
    """Learned keys and values before every sequence, in every layer (prefix tuning).

    Attributes:
        first_tokens: Tokens whose keys and values are the initial values, one position each.
    """

    kind = "prefix"

    first_tokens: tuple[int, ...]

    @torch.no_grad()
    def inject(self, model: PreTrainedModel) -> VirtualTokens:
        peft = import_peft("model.scope PrefixTuning")
        ids = torch.tensor([self.first_tokens], device=model.device)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        layers = getattr(cache, "layers", ())
        if not layers or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
            raise SlzoError(
                "model.scope PrefixTuning: not every layer of this model keeps its own keys and values; use LoRA"
            )
        states = [
            part[0].to(model.device) for layer in layers for part in (layer.keys, layer.values)
        ]  # each (heads, tokens, head_dim)
        shape = states[0].shape
        if any(part.shape != shape for part in states):
            raise SlzoError("model.scope PrefixTuning: the layers' keys and values differ in shape; use LoRA")
        heads, num_tokens, head_dim = shape
        config = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=num_tokens,
            num_layers=len(layers),
            num_attention_heads=heads,
            token_dim=heads * head_dim,
            encoder_hidden_size=heads * head_dim,
        )
        encoder = peft.PrefixEncoder(config).to(model.device, model.dtype)
        # peft's order: one row per token, with the keys and values of each layer
        encoder.embedding.weight.copy_(torch.stack(states).permute(2, 0, 1, 3).flatten(1))
        virtual_tokens = VirtualTokens(encoder, config).requires_grad_(False)
        model.add_module(_MODULE, virtual_tokens)
        return virtual_tokens

    def remove(self, model: PreTrainedModel) -> None:
        delattr(model, _MODULE)

    def merge(self, model: PreTrainedModel) -> None:
        raise SlzoError(
            "no weight can hold the keys and values of prefix tuning; use --format adapter, which peft loads"
        )

    def peft_files(self, model: PreTrainedModel) -> PeftFiles:
        learned = model.get_submodule(_MODULE)
        assert isinstance(learned, VirtualTokens)
        return prefix_files(learned.weight, learned.config.num_layers, learned.config.num_attention_heads)


def virtual_token_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the learned keys and values by their names in the model."""
    return {n: tensor for n, tensor in model.named_parameters() if n.startswith(f"{_MODULE}.")}
