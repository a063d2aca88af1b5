"""Keys and values of prompts and answers: attention that keeps them, and attention of one new token to what is kept.

Shapes used here: ``H`` heads, ``G`` key-value heads, ``D`` head size, ``T`` packed tokens, ``m`` rows in one buffer of
width ``W``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from slzo.batches.layout import PackedLayout, group_by_length
from slzo.models.attention import (
    LAYOUT_ARGUMENT,
    VIRTUAL_ARGUMENT,
    masked_attention,
    packed_attention_forward,
    use_attention,
    with_virtual_tokens,
)
from slzo.models.parts import ModelParts
from slzo.models.placement import placement_of
from slzo.utils.errors import SlzoError

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]], tuple[Tensor, None]]
"""What attention layers find in place of a packed layout: layer, query, key, value and options to output (1, tokens, H, D)."""

KeyValues = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""Keys and values of packed tokens by attention layer, shape (G, T, D) each."""

_NO_ROOM = 4  # slots that a full buffer grows by at least


@dataclass
class Buffer:
    """Keys and values of rows of similar length.

    Attributes:
        rows: Row numbers, in the order of the buffer's slots; a finished row is replaced by the last one.
        lengths: Tokens held for each slot, shape (m,), int64.
        width: Tokens that there is room for (W).
        keys: Per attention layer, shape (slots, G, W, D).
        values: Like keys.
    """

    rows: list[int]
    lengths: Tensor
    width: int
    keys: dict[nn.Module, Tensor] = field(default_factory=dict)
    values: dict[nn.Module, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Mapping[int, int], num_new: int, device: torch.device) -> list[Self]:
        """Empty buffers for rows with prompts of these lengths, and as many new tokens each."""
        rows = list(lengths)
        groups = [[rows[n] for n in group] for group in group_by_length([range(lengths[row]) for row in rows])]
        return [
            cls(group, torch.tensor([lengths[row] for row in group], device=device), lengths[group[0]] + num_new)
            for group in groups
        ]

    def fill(self, states: KeyValues, positions: Mapping[int, Tensor]) -> None:
        """Put the keys and values of prompts, at these packed positions, into their rows' slots."""
        own = [(slot, positions[row]) for slot, row in enumerate(self.rows) if row in positions]
        if not own:
            return
        device = self.lengths.device
        source = torch.cat([found for _, found in own])
        slots = torch.cat([torch.full((len(found),), slot, device=device) for slot, found in own])
        places = torch.cat([torch.arange(len(found), device=device) for _, found in own])
        for layer, pair in states.items():
            for store, new in zip((self.keys, self.values), pair, strict=True):
                if layer not in store:
                    heads, _, size = new.shape
                    # what is masked must be a number all the same
                    store[layer] = new.new_zeros(len(self.rows), heads, self.width, size)
                store[layer][slots, :, places] = new.index_select(1, source).transpose(0, 1)

    def remove(self, finished: set[int]) -> None:
        """Free the slots of finished rows."""
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot] not in finished:
                continue
            last = len(self.rows) - 1
            if slot != last:
                self._copy(last, slot)
                self.rows[slot] = self.rows[last]
                self.lengths[slot] = self.lengths[last]
            self.rows.pop()
            self.lengths = self.lengths[:last]

    def fork(self, row: int, new: int) -> None:
        """Add a row that holds what another one does."""
        slot, free = self.rows.index(row), len(self.rows)
        for store in (self.keys, self.values):
            for layer, states in store.items():
                if free == len(states):
                    more = states.new_zeros(max(_NO_ROOM, free // 2), *states.shape[1:])
                    store[layer] = torch.cat([states, more])
        self._copy(slot, free)
        self.rows.append(new)
        self.lengths = torch.cat([self.lengths, self.lengths[slot : slot + 1]])

    def _copy(self, source: int, target: int) -> None:
        for store in (self.keys, self.values):
            for states in store.values():
                states[target] = states[source]


@dataclass
class Recording:
    """Packed attention that keeps the keys and values."""

    layout: PackedLayout
    states: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """See :data:`Attend`."""
        self.states[layer] = (key[0], value[0])
        return packed_attention_forward(layer, query, key, value, None, packed_layout=self.layout, **options)


class NewTokens:
    """One new token per row attends to what its buffer holds, and to itself."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = buffers
        self.positions = torch.cat([buffer.lengths for buffer in buffers])
        self.used = [int(buffer.lengths.max()) + 1 for buffer in buffers]
        self.slots = [torch.arange(len(buffer.rows), device=buffer.lengths.device) for buffer in buffers]
        self._masks: dict[int | None, list[Tensor]] = {}

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """See :data:`Attend`."""
        sizes = [len(buffer.rows) for buffer in self.buffers]
        outputs = []
        own = (states[0].transpose(0, 1).split(sizes) for states in (query, key, value))
        virtual = options[VIRTUAL_ARGUMENT]
        masks = self._window_masks(options["sliding_window"], 0 if virtual is None else virtual.num_tokens)
        for buffer, used, slots, mask, q, k, v in zip(self.buffers, self.used, self.slots, masks, *own, strict=True):
            keys, values = buffer.keys[layer], buffer.values[layer]
            keys[slots, :, buffer.lengths] = k
            values[slots, :, buffer.lengths] = v
            # the heads that share keys become queries of one head: nothing has to be repeated
            grouped = q.reshape(len(slots), k.shape[1], -1, q.shape[-1])
            seen = keys[: len(slots), :, :used], values[: len(slots), :, :used]
            if virtual is not None:
                seen = with_virtual_tokens(virtual, layer, *seen)
            sinks = options["s_aux"]
            if sinks is not None:  # one for each query, as they are grouped
                sinks = sinks.view(1, k.shape[1], -1, 1)
            output = masked_attention(grouped, *seen, mask, options["scaling"], options["softcap"], sinks)
            outputs.append(output.flatten(1, 2))
        return torch.cat(outputs).unsqueeze(0), None

    def _window_masks(self, window: int | None, num_before: int) -> list[Tensor]:
        """Which tokens are seen, learned ones before the held ones, per buffer, shape (m, 1, 1, before + used), bool."""
        if window not in self._masks:
            masks = []
            for buffer, used in zip(self.buffers, self.used, strict=True):
                places = torch.arange(-num_before, used, device=buffer.lengths.device)
                distance = buffer.lengths[:, None] - places
                seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
                masks.append(seen[:, None, None])
            self._masks[window] = masks
        return self._masks[window]


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Hands over to what came in with the inputs; the mask is a stand-in. Without, transformers' own attention."""
    if LAYOUT_ARGUMENT not in kwargs:
        return packed_attention_forward(module, query, key, value, attention_mask, **kwargs)
    attend: Attend = kwargs[LAYOUT_ARGUMENT]
    options = {name: kwargs.get(name) for name in ("scaling", "sliding_window", "softcap", "s_aux", VIRTUAL_ARGUMENT)}
    return attend(module, query, key, value, options)


@contextmanager
def keeping_attention(parts: ModelParts) -> Iterator[None]:
    """The model's layers use this module's attention.

    Raises:
        SlzoError: Some layers run on another card, where what is kept is not.
    """
    placement = placement_of(parts.model)
    if placement is not None and placement.places.elsewhere:
        raise SlzoError(
            f"model.device_map: {placement.places.describe()}; answers are generated on one card, so put the other layers on cpu "
            "or disk"
        )
    before = parts.model.config.get_text_config(decoder=True)._attn_implementation
    use_attention(parts.model, "slzo_generate", _attention_forward)
    try:
        yield
    finally:
        parts.model.set_attn_implementation(before)
