"""Attention over packed sequences, plugged into transformers through its attention interface.

All other layers work on each token separately and need no padding. Attention gathers the tokens into right-padded sequences.
A causal model never attends to padding on the right, so no mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slzo.batches.layout import PackedLayout
from slzo.private.models import attention_of, can_replace_attention
from slzo.utils.errors import SlzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKED = "slzo_packed"
LAYOUT_ARGUMENT = "packed_layout"
VIRTUAL_ARGUMENT = "virtual_tokens"

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]], tuple[Tensor, None]]
"""Takes the place of a packed layout: attention from layer, query, key, value and options to output (1, tokens, heads, size)."""

KeyValues = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""Keys and values of packed tokens by attention layer, shape (key-value heads, T, head size) each."""


class VirtualTokens(nn.Module):
    """Keys and values that every sequence sees before its own tokens (prefix tuning), in peft's encoder with its config."""

    def __init__(self, encoder: Any, config: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config

    @property
    def num_tokens(self) -> int:
        """Number of virtual tokens."""
        return int(self.config.num_virtual_tokens)

    @property
    def weight(self) -> Tensor:
        """Learned states: one row per token, with the keys and values of each layer."""
        return self.encoder.embedding.weight

    def of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of one layer, each of shape (key_value_heads, tokens, head_dim)."""
        states = self.weight.view(self.num_tokens, self.config.num_layers, 2, self.config.num_attention_heads, -1)
        keys, values = states[:, index].permute(1, 2, 0, 3)
        return keys, values


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Switch a model to :func:`packed_attention_forward`; return ``False`` if its attention cannot be replaced."""
    from transformers import AttentionInterface, AttentionMaskInterface  # loads all of transformers' models code

    if not can_replace_attention(model):
        return False
    AttentionInterface.register(_PACKED, packed_attention_forward)
    AttentionMaskInterface.register(_PACKED, sdpa_mask)
    model.set_attn_implementation(_PACKED)
    return attention_of(model) == _PACKED


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_layout: PackedLayout | Attend | None = None,
    virtual_tokens: VirtualTokens | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence. Without a layout, transformers' own attention is used.

    Args:
        module: The attention layer.
        query: Shape (1, heads, T, head_dim) when packed.
        key: Keys, shaped like ``query`` but possibly with fewer heads.
        value: Values, shaped like ``key``.
        attention_mask: Used only without a layout.
        scaling: See :func:`masked_attention`.
        dropout: Must be 0, because both evaluations of a step must see the same function.
        sliding_window: Number of last tokens that a token attends to, including itself.
        softcap: See :func:`masked_attention`.
        s_aux: Attention sinks, shape (heads,); see :func:`masked_attention`.
        packed_layout: The packed sequences, or a function that computes the attention.
        virtual_tokens: Keys and values before those of every sequence; needs a layout.
        kwargs: Passed on to transformers' attention.

    Returns:
        The output, shape (1, T, heads, head_dim), and no attention weights.
    """
    if packed_layout is None:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        output = masked_attention(query, key, value, attention_mask, scaling, softcap, s_aux)
        return output.transpose(1, 2).contiguous(), None
    if not isinstance(packed_layout, PackedLayout):
        options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return packed_layout(module, query, key, value, {**options, VIRTUAL_ARGUMENT: virtual_tokens})
    rows = [states[0].transpose(0, 1).index_select(0, packed_layout.flat) for states in (query, key, value)]
    outputs, start = [], 0
    for index in packed_layout.groups:
        stop = start + index.numel()
        q, k, v = (states[start:stop].unflatten(0, index.shape).transpose(1, 2) for states in rows)
        if virtual_tokens is not None:
            k, v = with_virtual_tokens(virtual_tokens, module, k, v)
        # with virtual tokens there are more keys than queries
        needs_mask = virtual_tokens is not None or (sliding_window is not None and sliding_window < index.shape[1])
        mask = _causal_mask(q, k, sliding_window) if needs_mask else None
        output = masked_attention(q, k, v, mask, scaling, softcap, s_aux)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        start = stop
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, packed_layout.inverse).unsqueeze(0), None


def with_virtual_tokens(virtual: VirtualTokens, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Prepend the learned keys and values to those of a layer, shape (N, heads, L, head_dim).

    Raises:
        SlzoError: Their numbers of heads or head sizes differ from those of the layer.
    """
    pairs = list(zip(virtual.of_layer(layer.layer_idx), (key, value), strict=True))  # type: ignore[arg-type]
    if any((len(learned), learned.shape[2]) != (states.shape[1], states.shape[3]) for learned, states in pairs):
        raise SlzoError(
            "model.scope PrefixTuning: this model's attention uses other keys and values than its cache holds; use LoRA"
        )
    keys, values = (
        torch.cat([learned.to(states).expand(len(states), -1, -1, -1), states], dim=2) for learned, states in pairs
    )
    return keys, values


def _causal_mask(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return a mask of shape (queries, keys), ``True`` where attention is allowed; the last query sees the last key."""
    keys = torch.arange(key.shape[-2], device=key.device)
    return visible(keys[-query.shape[-2] :, None] - keys, window)


def visible(distance: Tensor, window: int | None) -> Tensor:
    """Return which keys a query attends to, given how many tokens each key is before the query."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention that supports bounded scores (Gemma 2, arXiv 2408.00118) and sinks (GPT-OSS), which fused kernels lack.

    Args:
        query: Queries, shape (N, heads, queries, head_dim).
        key: Keys, shape (N, key_value_heads, keys, head_dim); key_value_heads divides heads.
        value: Values, shaped like ``key``; their head_dim may differ.
        mask: Boolean, broadcastable to (N, heads, queries, keys), ``True`` where attention is allowed; ``None``
            is causal, for as many queries as keys.
        scaling: Factor of the scores; ``None`` for 1/sqrt(head_dim).
        softcap: Bound of the scores, ``softcap * tanh(scores / softcap)``; ``None`` for no bound.
        sinks: Scores of a key without a value that every query sees, one per head. If the queries of heads that share keys are
            in one head here, they are of shape (heads * queries,).
    """
    repeats, is_fused = query.shape[1] // key.shape[1], softcap is None and sinks is None
    # a GPU's kernels take heads that share keys only in half precision and without a mask
    shares = query.device.type == "cpu" or (mask is None and query.element_size() == 2)
    if repeats > 1 and not (is_fused and shares):
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        repeats = 1
    if is_fused:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=repeats > 1
        )
    mask = _causal_mask(query, key, None) if mask is None else mask
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        of_heads = sinks.to(scores.dtype).view(1, query.shape[1], -1, 1)
        scores = torch.cat([scores, of_heads.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights if sinks is None else weights[..., :-1]) @ value
