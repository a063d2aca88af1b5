"""Padding-free batches: examples as one row of tokens, shared prompts stored once.

Shapes used here: ``T`` tokens in the batch, ``N`` sequences (one per distinct prompt + candidate), ``L`` the longest
sequence of a group, ``B`` examples, ``C`` candidates, ``U`` positions whose logits are needed, ``R`` answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from slzo.data.encoding import EncodedExample

# A sequence joins a group of longer ones while it is at least this fraction of the longest: each group is one
# attention call, and attention over padding costs more than a few calls.
_GROUP_RATIO = 0.75


@dataclass(frozen=True)
class _Movable:
    """Moves every tensor field of a dataclass to a device."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        def move(value: object) -> object:
            if isinstance(value, Tensor | _Movable):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, tuple):
                return tuple(move(item) for item in value)
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class PackedLayout(_Movable):
    """Which packed tokens form which sequence.

    Attributes:
        groups: Per group of similar lengths, packed token positions, shape (N_g, L_g), int64. A shared prompt appears in
            every sequence that contains it. Padding, always on the right, repeats position 0.
        valid: Per group, shape (N_g, L_g), bool, ``False`` on padding.
        inverse: For each packed token its place in the concatenation of the flattened groups, shape (T,), int64.
    """

    groups: tuple[Tensor, ...]
    valid: tuple[Tensor, ...]
    inverse: Tensor

    def repeat(self, times: int) -> "PackedLayout":
        """The layout of ``times`` copies of the batch, one after the other in the packed row."""
        num_tokens = self.inverse.numel()
        offsets = [copy * num_tokens for copy in range(times)]
        inverse, start = [torch.empty_like(self.inverse) for _ in offsets], 0
        group_start = 0
        for group in self.groups:
            inside = (self.inverse >= start) & (self.inverse < start + group.numel())
            for copy in range(times):
                moved = self.inverse - start + group_start + copy * group.numel()
                inverse[copy] = torch.where(inside, moved, inverse[copy])  # no host sync, unlike a masked write
            start += group.numel()
            group_start += group.numel() * times
        return PackedLayout(
            groups=tuple(torch.cat([group + offset for offset in offsets]) for group in self.groups),
            valid=tuple(valid.repeat(times, 1) for valid in self.valid),
            inverse=torch.cat(inverse),
        )


@dataclass(frozen=True)
class TokenBatch(_Movable):
    """What the decoder layers need to know of a batch.

    Attributes:
        input_ids: Token ids, shape (T,), int64. The last token of a candidate predicts nothing and is left out.
        position_ids: Position of each token in its sequence, shape (T,), int64.
        layout: See :class:`PackedLayout`.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout


@dataclass(frozen=True)
class PackedBatch(TokenBatch):
    """One batch, ready for the model and for scoring.

    Attributes beyond those of :class:`TokenBatch`:
        example_index: Cache key of each example, length B.
        example_tokens: Packed tokens of each example, length B, in order; they sum to T.
        rows: Packed positions whose logits are needed, shape (U,), int64.
        token_row: For each answer token its index in ``rows``, shape (R,), int64.
        token_id: The answer tokens, shape (R,), int64.
        token_candidate: For each answer token its candidate, shape (R,), int64.
        candidate_length: Answer tokens of each candidate, shape (C,), int64.
        candidate_example: Example of each candidate, shape (C,), int64, not decreasing.
        candidate_slot: Place of each candidate within its example, shape (C,), int64.
        gold: Slot of the training target of each example, shape (B,), int64; -1 without a label.
        choice_ids: Distinct candidate tokens, shape (K,), int64, if every candidate is one token after the
            same prompt tokens, else ``None``.
        token_choice: For each answer token its index in ``choice_ids``, shape (R,), int64, or ``None``.
        most_candidates: Largest number of candidates of an example.
    """

    example_index: tuple[int, ...]
    example_tokens: tuple[int, ...]
    rows: Tensor
    token_row: Tensor
    token_id: Tensor
    token_candidate: Tensor
    candidate_length: Tensor
    candidate_example: Tensor
    candidate_slot: Tensor
    gold: Tensor
    choice_ids: Tensor | None
    token_choice: Tensor | None
    most_candidates: int

    def repeat(self, times: int) -> "TokenBatch":
        """Tokens and layout of ``times`` copies of the batch in one packed row."""
        return TokenBatch(self.input_ids.repeat(times), self.position_ids.repeat(times), self.layout.repeat(times))

    def select(self, numbers: Sequence[int]) -> "TokenBatch":
        """Tokens and layout of some examples, given by their place in the batch, in rising order."""
        starts = [0, *accumulate(self.example_tokens)]
        spans = [range(starts[number], starts[number + 1]) for number in numbers]
        kept = torch.tensor([position for span in spans for position in span], device=self.input_ids.device)
        place = torch.full_like(self.input_ids, -1)
        place[kept] = torch.arange(len(kept), device=kept.device)
        sequences = []
        for group, valid in zip(self.layout.groups, self.layout.valid, strict=True):
            for positions, real in zip(place[group].tolist(), valid.sum(dim=1).tolist(), strict=True):
                if positions[0] >= 0:
                    sequences.append(positions[:real])
        layout = build_layout(sequences, len(kept), grouped=True).to(self.input_ids.device)
        return TokenBatch(self.input_ids[kept], self.position_ids[kept], layout)

    def split(self, parts: int) -> tuple["PackedBatch | None", ...]:
        """Cut the batch into parts of nearly the same number of examples, in order; ``None`` for a part without any."""
        if parts == 1:
            return (self,)
        bounds = [self.num_examples * part // parts for part in range(parts + 1)]
        examples = [range(first, stop) for first, stop in pairwise(bounds)]
        tokens = [0, *accumulate(sum(self.example_tokens[n] for n in numbers) for numbers in examples)]
        # everything is in the order of the examples, so that a part of it is a slice
        candidates = torch.searchsorted(self.candidate_example, torch.tensor(bounds, device=self.gold.device)).tolist()
        answers = torch.searchsorted(self.token_candidate, torch.tensor(candidates, device=self.gold.device)).tolist()
        rows = torch.searchsorted(self.rows, torch.tensor(tokens, device=self.gold.device)).tolist()
        return tuple(
            None
            if not numbers
            else replace(
                self,
                **vars(self.select(numbers)),
                example_index=self.example_index[numbers.start : numbers.stop],
                example_tokens=self.example_tokens[numbers.start : numbers.stop],
                rows=self.rows[rows[n] : rows[n + 1]] - tokens[n],
                token_row=self.token_row[answers[n] : answers[n + 1]] - rows[n],
                token_id=self.token_id[answers[n] : answers[n + 1]],
                token_candidate=self.token_candidate[answers[n] : answers[n + 1]] - candidates[n],
                candidate_length=self.candidate_length[candidates[n] : candidates[n + 1]],
                candidate_example=self.candidate_example[candidates[n] : candidates[n + 1]] - numbers.start,
                candidate_slot=self.candidate_slot[candidates[n] : candidates[n + 1]],
                gold=self.gold[numbers.start : numbers.stop],
                token_choice=None if self.token_choice is None else self.token_choice[answers[n] : answers[n + 1]],
            )
            for n, numbers in enumerate(examples)
        )

    @property
    def num_examples(self) -> int:
        """Examples in the batch (B)."""
        return len(self.example_index)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model (T)."""
        return self.input_ids.numel()


def _shared_prefix(example: EncodedExample, share: bool) -> int:
    """Number of leading tokens that all candidates have in common, never reaching into an answer."""
    if not share and len(example.sequences) > 1:
        return 0
    limit = min(len(sequence.ids) - sequence.num_answer for sequence in example.sequences)
    first = example.sequences[0].ids
    for sequence in example.sequences[1:]:
        if sequence.ids[:limit] != first[:limit]:
            limit = next(i for i in range(limit) if sequence.ids[i] != first[i])
    return limit


def group_by_length(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Sequence numbers, sorted by falling length and cut into groups of similar length."""
    order = sorted(range(len(sequences)), key=lambda n: -len(sequences[n]))
    groups: list[list[int]] = []
    for number in order:
        if groups and len(sequences[number]) >= _GROUP_RATIO * len(sequences[groups[-1][0]]):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def build_layout(sequences: Sequence[Sequence[int]], num_tokens: int, grouped: bool) -> PackedLayout:
    """The layout of sequences of packed positions; ``grouped`` puts only similar lengths together."""
    groups, valid, offset = [], [], 0
    inverse = torch.zeros(num_tokens, dtype=torch.int64)
    members = group_by_length(sequences) if grouped else [list(range(len(sequences)))]
    for numbers in members:
        width = max(len(sequences[n]) for n in numbers)
        index = torch.zeros(len(numbers), width, dtype=torch.int64)
        mask = torch.zeros(len(numbers), width, dtype=torch.bool)
        for row, n in enumerate(numbers):
            positions = torch.tensor(sequences[n], dtype=torch.int64)
            index[row, : len(positions)] = positions
            mask[row, : len(positions)] = True
            inverse[positions] = offset + row * width + torch.arange(len(positions))
        groups.append(index)
        valid.append(mask)
        offset += index.numel()
    return PackedLayout(tuple(groups), tuple(valid), inverse)


def pack(examples: Sequence[EncodedExample], *, share_prompts: bool = True, group_lengths: bool = True) -> PackedBatch:
    """Build a batch without padding.

    Args:
        examples: What to pack, in this order.
        share_prompts: Store a prompt once for all of its candidates; ``False`` gives each candidate its own copy.
        group_lengths: Attend over sequences of similar length together; ``False`` pads all to the longest.
    """
    ids: list[int] = []
    positions: list[int] = []
    sequences: list[tuple[int, ...]] = []
    rows: dict[int, int] = {}
    token_row: list[int] = []
    token_id: list[int] = []
    token_candidate: list[int] = []
    lengths: list[int] = []
    owners: list[int] = []
    slots: list[int] = []
    example_tokens: list[int] = []
    for number, example in enumerate(examples):
        start = len(ids)
        shared = _shared_prefix(example, share_prompts)
        common = tuple(range(start, start + shared))
        ids.extend(example.sequences[0].ids[:shared])
        positions.extend(range(shared))
        for slot, sequence in enumerate(example.sequences):
            branch = sequence.ids[shared:-1]
            places = common + tuple(range(len(ids), len(ids) + len(branch)))
            ids.extend(branch)
            positions.extend(range(shared, shared + len(branch)))
            if branch or slot == 0:
                sequences.append(places)
            candidate = len(lengths)
            for offset in range(len(sequence.ids) - sequence.num_answer, len(sequence.ids)):
                token_row.append(rows.setdefault(places[offset - 1], len(rows)))
                token_id.append(sequence.ids[offset])
                token_candidate.append(candidate)
            lengths.append(sequence.num_answer)
            owners.append(number)
            slots.append(slot)
        example_tokens.append(len(ids) - start)
    # the normalizer cancels only between candidates that follow the very same tokens
    one_token = all(length == 1 for length in lengths) and all(
        sequence.ids[:-1] == example.sequences[0].ids[:-1] for example in examples for sequence in example.sequences
    )
    choices = sorted(set(token_id)) if one_token else []
    place = {token: i for i, token in enumerate(choices)}

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return PackedBatch(
        input_ids=tensor(ids),
        position_ids=tensor(positions),
        layout=build_layout(sequences, len(ids), group_lengths),
        example_index=tuple(example.index for example in examples),
        example_tokens=tuple(example_tokens),
        rows=tensor(list(rows)),
        token_row=tensor(token_row),
        token_id=tensor(token_id),
        token_candidate=tensor(token_candidate),
        candidate_length=tensor(lengths),
        candidate_example=tensor(owners),
        candidate_slot=tensor(slots),
        gold=tensor([example.gold[0] if example.gold else -1 for example in examples]),
        choice_ids=tensor(choices) if one_token else None,
        token_choice=tensor([place[token] for token in token_id]) if one_token else None,
        most_candidates=max(slots) + 1,
    )
