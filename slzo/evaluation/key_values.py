"""Key-value buffers, and the attention of new tokens to what they hold.

Shapes used here: ``H`` heads, ``G`` key-value heads, ``D`` head size, ``T`` packed tokens, ``m`` rows in one buffer of
width ``W``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from slzo.batches.layout import group_by_length
from slzo.models.attention import VIRTUAL_ARGUMENT, KeyValues, masked_attention, visible, with_virtual_tokens
from slzo.models.parts import ModelParts
from slzo.utils.errors import SlzoError

_MIN_GROWTH = 4  # slots by which a full buffer grows at least


@dataclass
class KeyValueBuffer:
    """Keys and values of rows of similar length.

    Attributes:
        rows: Row numbers, in the order of the buffer's slots; a finished row is replaced by the last one.
        lengths: Number of tokens stored in each slot, shape (m,), int64.
        width: Capacity of a slot, in tokens (W).
        keys: Keys per attention layer, shape (slots, G, W, D).
        values: Values per attention layer, same shape.
    """

    rows: list[int]
    lengths: Tensor
    width: int
    keys: dict[nn.Module, Tensor] = field(default_factory=dict)
    values: dict[nn.Module, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Mapping[int, int], num_new: int, device: torch.device) -> list[Self]:
        """Make empty buffers for rows with prompts of these lengths, by row, and ``num_new`` more tokens each."""
        rows = list(lengths)
        groups = [[rows[n] for n in group] for group in group_by_length(list(lengths.values()))]
        return [
            cls(group, torch.tensor([lengths[row] for row in group], device=device), lengths[group[0]] + num_new)
            for group in groups
        ]

    def fill(self, states: KeyValues, positions: Mapping[int, Tensor]) -> None:
        """Store the keys and values of prompts; ``positions`` has the packed positions of each row's prompt."""
        sources = [(slot, positions[row]) for slot, row in enumerate(self.rows) if row in positions]
        if not sources:
            return
        device = self.lengths.device
        source = torch.cat([packed for _, packed in sources])
        slots = torch.cat([torch.full((len(packed),), slot, device=device) for slot, packed in sources])
        places = torch.cat([torch.arange(len(packed), device=device) for _, packed in sources])
        for layer, pair in states.items():
            for store, new in zip((self.keys, self.values), pair, strict=True):
                if layer not in store:
                    heads, _, size = new.shape
                    # zeros, since masked values must be finite too
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
        """Add the row ``new`` as a copy of ``row``."""
        slot, free = self.rows.index(row), len(self.rows)
        for store in (self.keys, self.values):
            for layer, states in store.items():
                if free == len(states):
                    more = states.new_zeros(max(_MIN_GROWTH, free // 2), *states.shape[1:])
                    store[layer] = torch.cat([states, more])
        self._copy(slot, free)
        self.rows.append(new)
        self.lengths = torch.cat([self.lengths, self.lengths[slot : slot + 1]])

    def _copy(self, source: int, target: int) -> None:
        for store in (self.keys, self.values):
            for states in store.values():
                states[target] = states[source]


class StepAttention:
    """Attention of one new token per row to the tokens in its buffer and to itself."""

    def __init__(self, buffers: Sequence[KeyValueBuffer]) -> None:
        self.buffers = buffers
        self.positions = torch.cat([buffer.lengths for buffer in buffers])
        self.used = [int(buffer.lengths.max()) + 1 for buffer in buffers]
        self.slots = [torch.arange(len(buffer.rows), device=buffer.lengths.device) for buffer in buffers]
        self._masks: dict[tuple[int | None, int], list[Tensor]] = {}

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """See :data:`slzo.models.attention.Attend`."""
        sizes = [len(buffer.rows) for buffer in self.buffers]
        outputs = []
        by_buffer = (states[0].transpose(0, 1).split(sizes) for states in (query, key, value))
        virtual = options[VIRTUAL_ARGUMENT]
        masks = self._window_masks(options["sliding_window"], 0 if virtual is None else virtual.num_tokens)
        inputs = zip(self.buffers, self.used, self.slots, masks, *by_buffer, strict=True)
        for buffer, used, slots, mask, q, k, v in inputs:
            keys, values = buffer.keys[layer], buffer.values[layer]
            keys[slots, :, buffer.lengths] = k
            values[slots, :, buffer.lengths] = v
            # heads that share keys become several queries of one head, so that keys need not be repeated
            grouped = q.reshape(len(slots), k.shape[1], -1, q.shape[-1])
            seen = keys[: len(slots), :, :used], values[: len(slots), :, :used]
            if virtual is not None:
                seen = with_virtual_tokens(virtual, layer, *seen)
            output = masked_attention(grouped, *seen, mask, options["scaling"], options["softcap"], options["s_aux"])
            outputs.append(output.flatten(1, 2))
        return torch.cat(outputs).unsqueeze(0), None

    def _window_masks(self, window: int | None, num_before: int) -> list[Tensor]:
        """Return a mask per buffer, shape (m, 1, 1, before + used), bool; virtual tokens come before the stored ones."""
        key = window, num_before
        if key not in self._masks:
            masks = []
            for buffer, used in zip(self.buffers, self.used, strict=True):
                places = torch.arange(-num_before, used, device=buffer.lengths.device)
                masks.append(visible(buffer.lengths[:, None] - places, window)[:, None, None])
            self._masks[key] = masks
        return self._masks[key]


def check_places(parts: ModelParts) -> None:
    """Check that all layers run on the device of the buffers.

    Raises:
        SlzoError: Some layers run on another device.
    """
    if elsewhere := parts.placement.elsewhere:
        raise SlzoError(
            f"model.device_map: {elsewhere}; answers are generated on one GPU; put the other layers on cpu or disk"
        )
