"""Cache the states of prompts in the layers below the tuned ones; these layers never change."""

from functools import cached_property

import torch
from torch import Tensor, nn

from slzo.batches.encoded import prompt_alone
from slzo.batches.packing import PackedBatch, TokenBatch, pack
from slzo.evaluation.key_values import check_places
from slzo.models.attention import KeyValues
from slzo.models.key_value_capture import run_with_key_values
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.models.shared_key_values import by_head


class PromptStates:
    """Cache of the hidden states that enter a layer, and of the keys and values below it, in one row per packed token.

    Args:
        parts: The model, packed.
        cache: Stores the states; its ``start`` is the layer that they enter.
    """

    def __init__(self, parts: ModelParts, cache: PrefixCache) -> None:
        self.parts = parts
        self.cache = cache

    @property
    def token_bytes(self) -> int:
        """Size of one token's states in the cache, in bytes."""
        columns = self.parts.num_columns(self.cache.start) + sum(sum(sizes) for _, _, sizes in self._columns)
        return columns * self.parts.model.dtype.itemsize

    def of(self, batch: PackedBatch, keep: bool, max_tokens: int | None = None) -> tuple[Tensor, KeyValues]:
        """Return the states that enter the layer, shape (T, hidden), and the keys and values below it.

        Args:
            batch: Prompts, with answers or without; those that are not cached are computed.
            keep: Whether computed states are added to the cache.
            max_tokens: See :meth:`slzo.models.prefix_cache.PrefixCache.get_or_compute`.
        """
        wide = self.cache.get_or_compute(batch, self._run, keep, max_tokens)
        states, start = {}, wide.shape[1]
        for layer, heads, sizes in reversed(self._columns):
            start -= sum(sizes)
            key, value = wide[:, start : start + sum(sizes)].split(sizes, dim=1)
            states[layer] = (by_head(key, heads), by_head(value, heads))
        return wide[:, :start], states

    def _run(self, batch: TokenBatch) -> Tensor:
        hidden, states = run_with_key_values(self.parts, batch, 0, self.cache.start, None)
        pieces = [state.transpose(0, 1).flatten(1) for layer, _, _ in self._columns for state in states[layer]]
        return torch.cat([hidden, *pieces], dim=1)

    @cached_property
    def _columns(self) -> list[tuple[nn.Module, int, tuple[int, int]]]:
        """Attention layers with their number of key-value heads and of columns for keys and for values."""
        check_places(self.parts)
        probe = pack([prompt_alone(0, (0,))]).to(self.parts.model.device)
        with torch.no_grad():
            _, states = run_with_key_values(self.parts, probe, 0, self.cache.start, None)
        return [
            (layer, key.shape[0], (key.shape[0] * key.shape[2], value.shape[0] * value.shape[2]))
            for layer, (key, value) in states.items()
        ]
