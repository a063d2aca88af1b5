"""What prompts leave in the layers below the tuned ones, kept per row: these layers never change."""

from collections.abc import Callable
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from slzo.batches.encoded import prompt_alone
from slzo.batches.layout import PackedLayout
from slzo.batches.packing import PackedBatch, TokenBatch, pack
from slzo.evaluation.key_values import KeyValues, Recording, keeping_attention
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache


def recorded(
    parts: ModelParts, batch: TokenBatch, start: int, stop: int, hidden: Tensor | None
) -> tuple[Tensor, KeyValues]:
    """What :meth:`ModelParts.run` returns, and the keys and values of these layers; within :func:`keeping_attention`."""
    recording = Recording(batch.layout)
    return run_with(parts, batch, recording.attend, start, stop, hidden), recording.states


def run_with(
    parts: ModelParts, batch: TokenBatch, attend: Callable[..., object], start: int, stop: int, hidden: Tensor | None
) -> Tensor:
    """:meth:`ModelParts.run` with an attention of one's own; within :func:`keeping_attention`."""
    # the layout only travels through the model, from here to the attention
    own = TokenBatch(batch.input_ids, batch.position_ids, cast("PackedLayout", attend))
    return parts.run(own, start, stop, hidden)


class PromptStates:
    """Hidden states that enter a layer, and keys and values of the layers before it, side by side for each packed token.

    Args:
        parts: The model, packed.
        cache: Keeps them; says which layer.
    """

    def __init__(self, parts: ModelParts, cache: PrefixCache) -> None:
        self.parts = parts
        self.cache = cache

    @property
    def start(self) -> int:
        """The layer that the states enter."""
        return self.cache.start

    @property
    def token_bytes(self) -> int:
        """Space that a token takes in the cache."""
        model = self.parts.model
        width = model.config.get_text_config(decoder=True).hidden_size + sum(
            sum(sizes) for _, _, sizes in self._columns
        )
        return int(width) * (self.cache.dtype or model.dtype).itemsize

    def of(self, batch: PackedBatch, keep: bool, max_tokens: int | None = None) -> tuple[Tensor, KeyValues]:
        """States (T, hidden) that enter the layer, and keys and values below it, of prompts with what follows them.

        Those of rows that the cache does not hold are computed, and offered to it with ``keep``; ``max_tokens`` is
        that of :meth:`slzo.models.prefix_cache.PrefixCache.states_of`.
        """
        wide = self.cache.states_of(batch, self._run, self.parts.model.dtype, keep, max_tokens).wait()
        states, start = {}, wide.shape[1]
        for layer, heads, sizes in reversed(self._columns):
            start -= sum(sizes)
            key, value = wide[:, start : start + sum(sizes)].split(sizes, dim=1)
            states[layer] = (_by_head(key, heads), _by_head(value, heads))
        return wide[:, :start], states

    def _run(self, batch: TokenBatch) -> Tensor:
        with keeping_attention(self.parts):
            hidden, states = recorded(self.parts, batch, 0, self.start, None)
        pieces = [states[layer][own].transpose(0, 1).flatten(1) for layer, _, _ in self._columns for own in (0, 1)]
        return torch.cat([hidden, *pieces], dim=1)

    @cached_property
    def _columns(self) -> list[tuple[nn.Module, int, tuple[int, int]]]:
        """Each attention layer with its key-value heads and columns of keys and values, after those of the hidden state."""
        probe = pack([prompt_alone(0, (0,))]).to(self.parts.model.device)
        with torch.no_grad(), keeping_attention(self.parts):
            _, states = recorded(self.parts, probe, 0, self.start, None)
        return [
            (layer, key.shape[0], (key.shape[0] * key.shape[2], value.shape[0] * value.shape[2]))
            for layer, (key, value) in states.items()
        ]


def _by_head(states: Tensor, heads: int) -> Tensor:
    """Columns of all heads (T, G * D) as (G, T, D)."""
    return states.unflatten(1, (heads, -1)).transpose(0, 1)
