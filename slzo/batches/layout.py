"""The layout of packed tokens: index arithmetic between a packed row and padded groups of sequences.

Shapes: ``T`` packed tokens, ``N`` sequences, ``L`` length of the longest sequence of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

# A sequence joins a group if its length is at least this fraction of the longest one. Each group takes one attention call, and
# attention over padding costs more than a few calls.
_GROUP_RATIO = 0.75


@dataclass(frozen=True)
class Movable:
    """A dataclass whose tensor fields can be moved to a device."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on another device. Only copies to the CPU are blocking, because they are read at once."""
        non_blocking = torch.device(device).type != "cpu"

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, Movable):
                return value.to(device)
            if isinstance(value, tuple):
                return tuple(move(item) for item in value)
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class PackedLayout(Movable):
    """Which packed tokens form which sequence.

    Attributes:
        groups: For each group of sequences of similar length, the packed positions of their tokens, shape (N_g, L_g), int64. A
            shared prompt is part of every sequence that contains it. Padding is on the right and has position 0.
        valid: For each group, ``False`` on padding, shape (N_g, L_g), bool.
        inverse: Index of each packed token in the concatenation of the flattened groups, shape (T,), int64.
    """

    groups: tuple[Tensor, ...]
    valid: tuple[Tensor, ...]
    inverse: Tensor

    def sequences(self) -> list[list[int]]:
        """Return the packed positions of each sequence, group by group."""
        return [
            positions[:length]
            for group, valid in zip(self.groups, self.valid, strict=True)
            for positions, length in zip(group.tolist(), valid.sum(dim=1).tolist(), strict=True)
        ]

    def sequences_up_to(self, last: Tensor) -> list[Tensor]:
        """For each packed position in ``last``, return the packed positions of its sequence up to this one."""
        (positions,) = self.in_one_group.groups
        places = self.in_one_group.inverse[last].tolist()
        rows_and_columns = (divmod(place, positions.shape[1]) for place in places)
        return [positions[row, : column + 1] for row, column in rows_and_columns]

    def repeat(self, times: int) -> "PackedLayout":
        """Return the layout of ``times`` copies of the batch, one after the other in the packed row."""
        num_tokens = self.inverse.numel()
        return PackedLayout(
            groups=tuple(torch.cat([group + copy * num_tokens for copy in range(times)]) for group in self.groups),
            valid=tuple(valid.repeat(times, 1) for valid in self.valid),
            inverse=places_of_copies(self.inverse, [group.numel() for group in self.groups], times),
        )

    @cached_property
    def flat(self) -> Tensor:
        """The flattened groups, one after the other: the packed position of each padded place."""
        return torch.cat([index.flatten() for index in self.groups])

    @cached_property
    def in_one_group(self) -> "PackedLayout":
        """The layout with all sequences padded to the longest one."""
        if len(self.groups) == 1:
            return self
        width = max(group.shape[1] for group in self.groups)
        positions = torch.cat([F.pad(group, (0, width - group.shape[1])) for group in self.groups])
        valid = torch.cat([F.pad(valid, (0, width - valid.shape[1])) for valid in self.valid])
        rows = torch.arange(valid.numel(), device=valid.device).view_as(valid).split([*map(len, self.groups)])
        places = [own[:, : group.shape[1]].flatten() for own, group in zip(rows, self.groups, strict=True)]
        return PackedLayout((positions,), (valid,), torch.cat(places)[self.inverse])


NO_SEQUENCES = PackedLayout((), (), torch.empty(0, dtype=torch.int64))
"""Layout of tokens that run with an attention in place of their layout."""


def places_of_copies(places: Tensor, sizes: Sequence[int], times: int) -> Tensor:
    """Return the inverse index of a layout whose groups, of these sizes, are each repeated ``times`` times.

    ``places`` has the place of each element in the concatenation, shape (T,), int64. The result has those of all elements of the
    first copy, of the second, and so on, shape (times * T,).
    """
    copies, start = [], 0
    for size in sizes:
        copies.append(torch.arange(start, start + times * size, device=places.device).view(times, size))
        start += times * size
    return torch.cat(copies, dim=1)[:, places].flatten()


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return the numbers of sequences, sorted by descending length and cut into groups of similar length."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if groups and lengths[number] >= _GROUP_RATIO * lengths[groups[-1][0]]:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def build_layout(sequences: Sequence[Sequence[int]], num_tokens: int) -> PackedLayout:
    """Return the layout of sequences of packed positions, in groups of similar length."""
    groups, valid, offset = [], [], 0
    inverse = torch.zeros(num_tokens, dtype=torch.int64)
    for numbers in group_by_length([*map(len, sequences)]):
        rows = [torch.tensor(sequences[number], dtype=torch.int64) for number in numbers]
        group = pad_sequence(rows, batch_first=True)
        for row, positions in enumerate(rows):
            inverse[positions] = offset + row * group.shape[1] + torch.arange(len(positions))
        groups.append(group)
        valid.append(pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True))
        offset += group.numel()
    return PackedLayout(tuple(groups), tuple(valid), inverse)
