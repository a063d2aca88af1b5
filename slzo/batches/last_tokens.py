"""The last tokens of each sequence: those that the needed logits depend on, if the keys and values of the others are known.

Shapes: ``T`` packed tokens, ``U`` needed positions, ``K`` last tokens, ``S`` sequences of a group, of at most ``E`` earlier and
``L`` last tokens.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from slzo.batches.layout import Movable, PackedLayout, places_of_copies


@dataclass(frozen=True)
class LastTokensGroup(Movable):
    """Sequences of similar length.

    Attributes:
        earlier: Packed positions of the earlier tokens, shape (S, E); padding is 0.
        is_earlier: ``False`` on their padding.
        last: Indices of the last tokens in :attr:`LastTokens.positions`, shape (S, L); padding on the right is 0.
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
    groups: tuple[LastTokensGroup, ...]
    inverse: Tensor

    @classmethod
    def of(cls, layout: PackedLayout, needed: Tensor) -> Self:
        """Return the last tokens of the sequences of a layout on the CPU.

        ``needed`` are the packed positions whose logits are needed, shape (U,), int64.
        """
        is_needed = torch.zeros(len(layout.inverse), dtype=torch.bool)
        is_needed[needed] = True
        sequences = [
            (group, valid, (is_needed[group] & valid).int().argmax(dim=1))
            for group, valid in zip(layout.groups, layout.valid, strict=True)
        ]
        is_last = torch.zeros_like(is_needed)
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
            groups.append(LastTokensGroup(group[:, : len(before)].masked_fill(~is_earlier, 0), is_earlier, last))
            inverse[last[fits]] = offset + fits.flatten().nonzero()[:, 0]
            offset += last.numel()
        return cls(positions, tuple(groups), inverse)

    def repeat(self, times: int, num_tokens: int) -> Self:
        """Return the last tokens of ``times`` copies of a batch of ``num_tokens`` tokens, one after the other."""
        if times == 1:
            return self
        starts = torch.arange(times, device=self.positions.device)[:, None]
        groups = [
            LastTokensGroup(
                (group.earlier + starts[..., None] * num_tokens).flatten(0, 1),
                group.is_earlier.repeat(times, 1),
                (group.last + starts[..., None] * len(self.positions)).flatten(0, 1),
            )
            for group in self.groups
        ]
        inverse = places_of_copies(self.inverse, [group.last.numel() for group in self.groups], times)
        return type(self)((self.positions + starts * num_tokens).flatten(), tuple(groups), inverse)
