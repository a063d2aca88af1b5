"""Batches without padding: all examples in one row of tokens, with shared prompts stored once.

Shapes: ``T`` tokens in the batch, ``B`` examples, ``C`` candidates, ``U`` positions whose logits are needed, ``R`` answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from slzo.batches.chunks import chunk_by_tokens
from slzo.batches.encoded import EncodedExample
from slzo.batches.last_tokens import LastTokens
from slzo.batches.layout import NO_SEQUENCES, Movable, PackedLayout, build_layout


@dataclass(frozen=True)
class TokenBatch(Movable):
    """The part of a batch that the decoder layers need.

    Attributes:
        input_ids: Token ids, shape (T,), int64. The last token of a candidate predicts nothing and is left out.
        position_ids: Position of each token in its sequence, shape (T,), int64.
        layout: The tokens of each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout

    def tokens_at(self, positions: Tensor, times: int) -> "TokenBatch":
        """Return ``times`` copies of some tokens, to run with an attention that takes the place of the layout."""
        ids, places = (values[positions].repeat(times) for values in (self.input_ids, self.position_ids))
        return TokenBatch(ids, places, NO_SEQUENCES)


@dataclass(frozen=True)
class PackedBatch(TokenBatch):
    """A batch with the indices that scoring needs.

    Attributes beyond those of :class:`TokenBatch`:
        examples: The examples, length B.
        example_index: Cache key of each example, length B.
        example_tokens: Number of packed tokens of each example, length B, in order. They sum to T.
        num_logits: Number of positions in ``logit_positions`` of each example, length B, in order. They sum to U.
        logit_positions: Packed positions whose logits are needed, shape (U,), int64.
        logit_example: Example of each of these, shape (U,), int64, not decreasing.
        token_logit: Index in ``logit_positions`` of each answer token, shape (R,), int64.
        token_id: Ids of the answer tokens, shape (R,), int64.
        token_candidate: Candidate of each answer token, shape (R,), int64.
        candidate_length: Number of scored answer tokens of each candidate, shape (C,), int64.
        candidate_example: Example of each candidate, shape (C,), int64, not decreasing.
        candidate_slot: Index of each candidate within its example, shape (C,), int64.
        gold: Slot of the training target of each example, shape (B,), int64; -1 without a label.
        right: Whether each candidate is right, shape (C,), bool.
        choice_ids: Distinct candidate tokens, shape (K,), int64. ``None`` unless every candidate is one token and all candidates
            of an example follow the same tokens.
        token_choice: Index in ``choice_ids`` of each answer token, shape (R,), int64, or ``None``.
        most_candidates: Largest number of candidates of an example.
        shares_tokens: Whether tokens belong to several examples, see :func:`slzo.batches.sharing.share_beginnings`. Then
            ``examples`` and ``example_tokens`` are empty, and the batch cannot be cut.
        source: The batch on the CPU that this one is a copy of, if it is on another device. If you replace a field, replace that
            of ``source`` too.
    """

    examples: tuple[EncodedExample, ...]
    example_index: tuple[int, ...]
    example_tokens: tuple[int, ...]
    num_logits: tuple[int, ...]
    logit_positions: Tensor
    logit_example: Tensor
    token_logit: Tensor
    token_id: Tensor
    token_candidate: Tensor
    candidate_length: Tensor
    candidate_example: Tensor
    candidate_slot: Tensor
    gold: Tensor
    right: Tensor
    choice_ids: Tensor | None
    token_choice: Tensor | None
    most_candidates: int
    shares_tokens: bool = False
    source: Self | None = None

    @property
    def on_cpu(self) -> Self:
        """The same batch on the CPU. Indices are computed from it, since reading from a GPU waits for all of its work."""
        return self if self.source is None else self.source

    @cached_property
    def last_tokens(self) -> LastTokens:
        """In each sequence, the first token whose logits are needed, and all after it."""
        own = self.on_cpu
        return LastTokens.of(own.layout, own.logit_positions).to(self.logit_positions.device)

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on another device, which keeps this batch as its ``source``."""
        if torch.device(device).type == "cpu":
            return self.on_cpu
        return replace(super(PackedBatch, replace(self, source=None)).to(device), source=self.on_cpu)

    def repeat(self, times: int) -> TokenBatch:
        """Return tokens and layout of ``times`` copies of the batch in one packed row."""
        if times == 1:
            return self
        return TokenBatch(self.input_ids.repeat(times), self.position_ids.repeat(times), self.layout.repeat(times))

    def select(self, numbers: Sequence[int]) -> "PackedBatch":
        """Return the batch of some of the examples, given by their numbers in the batch; prompts are shared in it."""
        part = pack([self.examples[number] for number in numbers])
        if self.choice_ids is None:  # the parts have no choices that the batch does not have
            part = replace(part, choice_ids=None, token_choice=None)
        return replace(part, most_candidates=self.most_candidates).to(self.input_ids.device)

    def cut(self, max_tokens: int | None) -> tuple["PackedBatch", ...]:
        """Cut the batch, in order, into parts of at most ``max_tokens`` tokens. A longer example is a separate part."""
        if max_tokens is None or self.num_tokens <= max_tokens or self.num_examples == 1:
            return (self,)
        return tuple(map(self.select, chunk_by_tokens(self.example_tokens, max_tokens)))

    @property
    def num_examples(self) -> int:
        """Number of examples (B)."""
        return len(self.example_index)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that run through the model (T)."""
        return self.input_ids.numel()


def _num_shared(example: EncodedExample) -> int:
    """Return the number of leading tokens that all candidates have in common, without tokens of answers."""
    limit = min(len(sequence.ids) - sequence.num_answer for sequence in example.sequences)
    first = example.sequences[0].ids
    for sequence in example.sequences[1:]:
        if sequence.ids[:limit] != first[:limit]:
            limit = next(i for i in range(limit) if sequence.ids[i] != first[i])
    return limit


@dataclass
class _Tokens:
    """The tokens of packed examples. The attributes become those of :class:`PackedBatch`, ``sequences`` its layout."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[tuple[int, ...]] = field(default_factory=list)
    logit_positions: dict[int, int] = field(default_factory=dict)  # position -> its number, in order
    token_logit: list[int] = field(default_factory=list)
    example_tokens: list[int] = field(default_factory=list)
    num_logits: list[int] = field(default_factory=list)

    def add(self, example: EncodedExample) -> None:
        """Add an example: the tokens that its candidates share, then those that each adds."""
        start, before = len(self.ids), len(self.logit_positions)
        shared = _num_shared(example)
        common = self._append(example.sequences[0].ids[:shared], 0)
        for slot, sequence in enumerate(example.sequences):
            branch = self._append(sequence.ids[shared:-1], shared)
            packed = common + branch
            if branch or slot == 0:
                self.sequences.append(packed)
            # a token is predicted by the logits of the token before it
            self.token_logit += [
                self.logit_positions.setdefault(packed[at], len(self.logit_positions)) for at in sequence.places
            ]
        self.example_tokens.append(len(self.ids) - start)
        self.num_logits.append(len(self.logit_positions) - before)

    def _append(self, ids: Sequence[int], position: int) -> tuple[int, ...]:
        """Append tokens, the first at this position of its sequence; return where they are in the packed row."""
        start = len(self.ids)
        self.ids.extend(ids)
        self.positions.extend(range(position, position + len(ids)))
        return tuple(range(start, len(self.ids)))


def _chooses_one_token(example: EncodedExample) -> bool:
    """Return whether all candidates are one token after the same tokens."""
    before = example.sequences[0].ids[:-1]
    return all(len(sequence.places) == 1 and sequence.ids[:-1] == before for sequence in example.sequences)


def pack(examples: Sequence[EncodedExample]) -> PackedBatch:
    """Create a batch without padding, with the examples in this order. A prompt is stored once for all its candidates."""
    tokens = _Tokens()
    for example in examples:
        tokens.add(example)
    candidates = [candidate for example in examples for candidate in example.sequences]
    token_id = [candidate.ids[place] for candidate in candidates for place in candidate.places]
    lengths = [len(candidate.places) for candidate in candidates]
    owners = [number for number, example in enumerate(examples) for _ in example.sequences]
    slots = [slot for example in examples for slot in range(len(example.sequences))]
    # the normalizer cancels only between candidates that follow the same tokens
    one_token = all(map(_chooses_one_token, examples))
    choices = sorted(set(token_id)) if one_token else []
    choice_index = {token: i for i, token in enumerate(choices)}

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return PackedBatch(
        input_ids=tensor(tokens.ids),
        position_ids=tensor(tokens.positions),
        layout=build_layout(tokens.sequences, len(tokens.ids)),
        examples=tuple(examples),
        example_index=tuple(example.index for example in examples),
        example_tokens=tuple(tokens.example_tokens),
        num_logits=tuple(tokens.num_logits),
        logit_positions=tensor(list(tokens.logit_positions)),
        logit_example=tensor([number for number, count in enumerate(tokens.num_logits) for _ in range(count)]),
        token_logit=tensor(tokens.token_logit),
        token_id=tensor(token_id),
        token_candidate=tensor([number for number, length in enumerate(lengths) for _ in range(length)]),
        candidate_length=tensor(lengths),
        candidate_example=tensor(owners),
        candidate_slot=tensor(slots),
        gold=tensor([example.gold[0] if example.gold else -1 for example in examples]),
        right=torch.tensor([slot in examples[owner].gold for slot, owner in zip(slots, owners, strict=True)]),
        choice_ids=tensor(choices) if one_token else None,
        token_choice=tensor([choice_index[token] for token in token_id]) if one_token else None,
        most_candidates=max(slots) + 1,
    )


@dataclass(frozen=True)
class Block:
    """Examples, in packing order, that always run in one forward pass: matrix products of another height round differently."""

    examples: Sequence[EncodedExample]

    @property
    def keys(self) -> tuple[int, ...]:
        """Cache key of each example."""
        return tuple(example.index for example in self.examples)

    @property
    def example_tokens(self) -> tuple[int, ...]:
        """Packed tokens of each example: those that its candidates share, and those that each adds, without its last one."""
        shared = [_num_shared(example) for example in self.examples]
        return tuple(
            number + sum(len(sequence.ids) - 1 - number for sequence in example.sequences)
            for number, example in zip(shared, self.examples, strict=True)
        )

    @property
    def num_tokens(self) -> int:
        """Number of packed tokens."""
        return sum(self.example_tokens)

    def pack(self) -> PackedBatch:
        """Return the packed batch."""
        return pack(self.examples)
