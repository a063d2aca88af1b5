"""Attention of the last tokens of each sequence, at several points, to the recorded earlier tokens and to each other.

Shapes: ``K`` last tokens, ``N`` points, ``S`` sequences of a group, of at most ``E`` earlier and ``L`` last tokens; ``T`` packed
tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from slzo.batches.last_tokens import LastTokens, LastTokensGroup
from slzo.models.attention import KeyValues, masked_attention, visible


class LastTokensAttention:
    """Attention of the last tokens at each point to the recorded earlier tokens and to each other."""

    def __init__(self, tokens: LastTokens, states: KeyValues) -> None:
        self.tokens, self.states = tokens, states
        self._masks: dict[tuple[int, int | None], list[Tensor]] = {}  # by number of points and window

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """See :data:`slzo.models.attention.Attend`."""
        points = query.shape[2] // len(self.tokens.positions)
        # (N, heads, K, size)
        q, k, v = (states[0].unflatten(1, (points, -1)).transpose(0, 1) for states in (query, key, value))
        recorded_keys, recorded_values = self.states[layer]
        outputs, shape = [], (points, options["sliding_window"])
        # for each group, (S, 1, N L, E + N L), bool: True where attention is allowed
        if shape not in self._masks:
            self._masks[shape] = [_mask(group, *shape) for group in self.tokens.groups]
        for group, mask in zip(self.tokens.groups, self._masks[shape], strict=True):
            own = [_by_sequence(states, group.last) for states in (q, k, v)]
            keys = torch.cat([_earlier(recorded_keys, group.earlier), own[1]], dim=2)
            values = torch.cat([_earlier(recorded_values, group.earlier), own[2]], dim=2)
            output = masked_attention(
                own[0], keys, values, mask, options["scaling"], options["softcap"], options["s_aux"]
            )
            # (S, heads, N L, size) to (S L, N, heads, size)
            output = output.unflatten(2, (points, -1)).permute(0, 3, 2, 1, 4)
            outputs.append(output.flatten(0, 1))
        chosen = torch.cat(outputs).index_select(0, self.tokens.inverse)
        return chosen.transpose(0, 1).flatten(0, 1).unsqueeze(0), None


def _mask(group: LastTokensGroup, num_points: int, window: int | None) -> Tensor:
    num_earlier, most = group.earlier.shape[1], group.last.shape[1]
    device = group.last.device
    place, start = torch.arange(most, device=device), group.is_earlier.sum(dim=1)
    own = visible(place[:, None] - place, window).expand(len(start), -1, -1)
    distance = (start[:, None] + place)[..., None] - torch.arange(num_earlier, device=device)
    earlier = group.is_earlier[:, None] & visible(distance, window)
    same = torch.eye(num_points, dtype=torch.bool, device=device)
    own = (own[:, None, :, None] & same[:, None, :, None]).flatten(3).flatten(1, 2)
    return torch.cat([earlier.repeat(1, num_points, 1), own], dim=2)[:, None]


def _by_sequence(states: Tensor, last: Tensor) -> Tensor:
    """Arrange states of the last tokens, shape (N, heads, K, size), by sequence, shape (S, heads, N L, size)."""
    chosen = states.index_select(2, last.flatten()).unflatten(2, last.shape)
    return chosen.permute(2, 1, 0, 3, 4).flatten(2, 3)


def _earlier(states: Tensor, positions: Tensor) -> Tensor:
    """Return recorded states, shape (heads, T, size), of the earlier tokens, shape (S, heads, E, size)."""
    return states.index_select(1, positions.flatten()).unflatten(1, positions.shape).transpose(0, 1)
