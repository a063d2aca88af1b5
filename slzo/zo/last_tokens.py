"""Run layers at several points for the last tokens of each sequence, with the keys and values of all earlier tokens.

If the points differ only in the states of the last tokens, those of the earlier ones are the same at all points: a token never
attends to later ones. So the layers run over all tokens once, and then over the last tokens once for each point.

Shapes: ``T`` packed tokens, ``K`` last tokens, ``N`` points, ``S`` sequences of a group, of at most ``E`` earlier and ``L`` last
tokens; heads and head sizes as in :mod:`slzo.evaluation.key_values`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slzo.batches.layout import Movable
from slzo.batches.packing import PackedBatch, TokenBatch
from slzo.evaluation.key_values import KeyValues
from slzo.evaluation.prompt_states import keys_and_values, recorded, run_with
from slzo.models.attention import masked_attention
from slzo.models.parts import ModelParts
from slzo.models.placement import placement_of
from slzo.zo.factored import FactoredGradient, factored_vjp
from slzo.zo.tuned import TunedTensors


@dataclass(frozen=True)
class _Group(Movable):
    """Sequences of similar length.

    Attributes:
        earlier: Packed positions of the earlier tokens, shape (S, E); padding is 0.
        is_earlier: ``False`` on their padding.
        last: Numbers of the last tokens, shape (S, L), padding on the right is 0.
    """

    earlier: Tensor
    is_earlier: Tensor
    last: Tensor


@dataclass(frozen=True)
class LastTokens(Movable):
    """In each sequence of a batch, the first token whose logits are needed, and all after it.

    Attributes:
        positions: Their packed positions, shape (K,), int64, rising.
        groups: The sequences.
        inverse: Place of each last token in the concatenation of the flattened ``last`` of all groups, shape (K,).
    """

    positions: Tensor
    groups: tuple[_Group, ...]
    inverse: Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> "LastTokens":
        """Return the last tokens of a batch, on its device."""
        if batch.source is not None:
            return cls.of(batch.source).to(batch.needed.device)
        layout = batch.layout
        is_chosen = torch.zeros(batch.num_tokens, dtype=torch.bool)
        is_chosen[batch.needed] = True
        sequences = [
            (group, valid, (is_chosen[group] & valid).int().argmax(dim=1))
            for group, valid in zip(layout.groups, layout.valid, strict=True)
        ]
        is_last = torch.zeros_like(is_chosen)
        for group, valid, start in sequences:
            column = torch.arange(group.shape[1])
            is_last[group[valid & (column >= start[:, None])]] = True
        positions = is_last.nonzero()[:, 0]
        number = is_last.cumsum(0) - 1
        groups, inverse, offset = [], torch.zeros_like(positions), 0
        for group, valid, start in sequences:
            length = valid.sum(dim=1)
            most = int((length - start).max())
            place = start[:, None] + torch.arange(most)
            fits = place < length[:, None]
            last = number[group.gather(1, place.clamp(max=group.shape[1] - 1))].masked_fill(~fits, 0)
            before = torch.arange(int(start.max()))
            is_earlier = before < start[:, None]
            groups.append(_Group(group[:, : len(before)].masked_fill(~is_earlier, 0), is_earlier, last))
            inverse[last[fits]] = offset + fits.flatten().nonzero()[:, 0]
            offset += last.numel()
        return cls(positions, tuple(groups), inverse)

    def tokens(self, batch: PackedBatch, points: int) -> TokenBatch:
        """Return these tokens of a batch once for each point, to run with an attention that takes the layout's place."""
        ids, places = (values[self.positions].repeat(points) for values in (batch.input_ids, batch.position_ids))
        return TokenBatch(ids, places, batch.layout)


class _PointsAttention:
    """Attention of the last tokens at each point to the recorded earlier tokens and to each other."""

    def __init__(self, tokens: LastTokens, states: KeyValues, num_points: int) -> None:
        self.tokens, self.states, self.num_points = tokens, states, num_points
        self._masks: dict[int | None, list[Tensor]] = {}

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        """See :data:`slzo.models.attention.Attend`."""
        points = self.num_points
        # (N, heads, K, size)
        q, k, v = (states[0].unflatten(1, (points, -1)).transpose(0, 1) for states in (query, key, value))
        recorded_keys, recorded_values = self.states[layer]
        sinks = None if options["s_aux"] is None else options["s_aux"].view(1, -1, 1, 1)
        outputs, window = [], options["sliding_window"]
        if window not in self._masks:  # for each group, (S, 1, N L, E + N L), bool: True where attention is allowed
            self._masks[window] = [_mask(group, points, window) for group in self.tokens.groups]
        for group, mask in zip(self.tokens.groups, self._masks[window], strict=True):
            own = [_by_sequence(states, group.last) for states in (q, k, v)]
            keys = torch.cat([_earlier(recorded_keys, group.earlier), own[1]], dim=2)
            values = torch.cat([_earlier(recorded_values, group.earlier), own[2]], dim=2)
            output = masked_attention(own[0], keys, values, mask, options["scaling"], options["softcap"], sinks)
            # (S, heads, N L, size) to (S L, N, heads, size)
            output = output.unflatten(2, (points, -1)).permute(0, 3, 2, 1, 4)
            outputs.append(output.flatten(0, 1))
        chosen = torch.cat(outputs).index_select(0, self.tokens.inverse)
        return chosen.transpose(0, 1).flatten(0, 1).unsqueeze(0), None


def _mask(group: _Group, num_points: int, window: int | None) -> Tensor:
    num_earlier, most = group.earlier.shape[1], group.last.shape[1]
    device = group.last.device
    place = torch.arange(most, device=device)
    own = (place[:, None] >= place).expand(len(group.last), -1, -1)
    earlier = group.is_earlier[:, None].expand(-1, most, -1)
    if window is not None:
        own = own & (place[:, None] - place < window)
        start = group.is_earlier.sum(dim=1)
        distance = (start[:, None] + place)[..., None] - torch.arange(num_earlier, device=device)
        earlier = earlier & (distance < window)
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


class LayersAbove(NamedTuple):
    """The layers above the tuned one, run at several points for one batch.

    Attributes:
        positions: Packed positions of the tokens that run at each point, shape (K,), int64, rising.
        final: Final states of these tokens without any change, shape (K, hidden).
        at: Returns the final states, shape (N, K, hidden), from states that enter the layers, shape (N, K, hidden).
    """

    positions: Tensor
    final: Tensor
    at: Callable[[Tensor], Tensor]


def layers_above(parts: ModelParts, start: int, batch: PackedBatch, hidden: Tensor) -> LayersAbove:
    """Return the layers from ``start`` on for a batch. If possible, only the last tokens of each sequence run at each point.

    Args:
        parts: The model.
        start: The first of the layers.
        batch: The batch.
        hidden: States that enter the first layer, shape (T, hidden). Only those of the batch's needed positions may change.
    """
    stop = parts.num_layers
    if not _runs_last_tokens(parts):

        def over_all_tokens(entering: Tensor) -> Tensor:
            final = parts.run(batch.repeat(len(entering)), start, stop, entering.flatten(0, 1))
            return final.unflatten(0, (len(entering), -1))

        positions = torch.arange(batch.num_tokens, device=hidden.device)
        return LayersAbove(positions, parts.run(batch, start, stop, hidden), over_all_tokens)

    last, final = LastTokens.of(batch), None
    placement = placement_of(parts.model)
    # one more pass would read or gather all weights once more, unless they stay
    if placement is not None and placement.offloads and stop - start > placement.num_kept:
        states_after, states = recorded(parts, batch, start, stop, hidden)
        final = states_after[last.positions]
    else:
        states = keys_and_values(parts, batch, start, stop, hidden)
    # its masks hold for one number of points
    attention_at = lru_cache(maxsize=1)(partial(_PointsAttention, last, states))

    def over_last_tokens(entering: Tensor) -> Tensor:
        points = len(entering)
        attend, tokens = attention_at(points).attend, last.tokens(batch, points)
        return run_with(parts, tokens, attend, start, stop, entering.flatten(0, 1)).unflatten(0, (points, -1))

    if final is None:
        final = over_last_tokens(hidden[last.positions][None])[0]
    return LayersAbove(last.positions, final, over_last_tokens)


def differentiable_layers(
    parts: ModelParts, tuned: TunedTensors, start: int, stop: int, batch: PackedBatch, entering: Tensor
) -> tuple[Tensor, Callable[[Tensor], FactoredGradient]]:
    """Run layers; return their output and, for the needed positions, the transpose of its derivative.

    The derivative is taken through the last tokens of each sequence alone, to which the others contribute keys and values.

    Args:
        parts: The model.
        tuned: Masters of some of the layers' tensors; the live weights must equal them.
        start: The first layer.
        stop: One past the last layer.
        batch: The batch.
        entering: States that enter the first layer, shape (T, hidden).

    Returns:
        The output, shape (T, hidden), detached; and a function from the gradient with respect to the output at the needed
        positions, shape (U, hidden), to the gradient of the masters. It can be called once.
    """
    run = partial(parts.run, batch, start, stop, entering, norm=False)
    if not _runs_last_tokens(parts):
        output, pull_back = factored_vjp(parts.model, tuned, partial(run, derivatives=True))
        return output, lambda gradient: pull_back(torch.zeros_like(output).index_copy_(0, batch.needed, gradient))

    def at_needed() -> Tensor:
        last, options = LastTokens.of(batch), {"norm": False, "derivatives": True}
        attention = _PointsAttention(last, keys_and_values(parts, batch, start, stop, entering, derivatives=True), 1)
        at_last = run_with(
            parts, last.tokens(batch, 1), attention.attend, start, stop, entering[last.positions], **options
        )
        return at_last[torch.searchsorted(last.positions, batch.needed)]

    return run(), lambda gradient: factored_vjp(parts.model, tuned, at_needed)[1](gradient)


def _runs_last_tokens(parts: ModelParts) -> bool:
    placement = placement_of(parts.model)
    return parts.packed and not (placement is not None and placement.elsewhere)
