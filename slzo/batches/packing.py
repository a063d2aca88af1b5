"""Padding-free batches: examples as one row of tokens, shared prompts stored once.

Shapes used here: ``T`` tokens in the batch, ``N`` sequences (one per distinct prompt + candidate), ``L`` the longest
sequence of a group, ``B`` examples, ``C`` candidates, ``U`` positions whose logits are needed, ``R`` answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from slzo.batches.encoded import EncodedExample
from slzo.batches.layout import Movable, PackedLayout, build_layout


@dataclass(frozen=True)
class TokenBatch(Movable):
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
        needed: Packed positions whose logits are needed, shape (U,), int64.
        token_needed: For each answer token its index in ``needed``, shape (R,), int64.
        token_id: The answer tokens, shape (R,), int64.
        token_candidate: For each answer token its candidate, shape (R,), int64.
        candidate_length: Scored answer tokens of each candidate, shape (C,), int64.
        candidate_example: Example of each candidate, shape (C,), int64, not decreasing.
        candidate_slot: Place of each candidate within its example, shape (C,), int64.
        gold: Slot of the training target of each example, shape (B,), int64; -1 without a label.
        right: Whether each candidate is a right one, shape (C,), bool.
        choice_ids: Distinct candidate tokens, shape (K,), int64, if each is one token after the same prompt, else ``None``.
        token_choice: For each answer token its index in ``choice_ids``, shape (R,), int64, or ``None``.
        most_candidates: Largest number of candidates of an example.
    """

    example_index: tuple[int, ...]
    example_tokens: tuple[int, ...]
    needed: Tensor
    token_needed: Tensor
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

    def repeat(self, times: int) -> TokenBatch:
        """Tokens and layout of ``times`` copies of the batch in one packed row."""
        return TokenBatch(self.input_ids.repeat(times), self.position_ids.repeat(times), self.layout.repeat(times))

    def select(self, numbers: Sequence[int]) -> TokenBatch:
        """Tokens and layout of some examples, given by their place in the batch, in rising order."""
        starts = [0, *accumulate(self.example_tokens)]
        spans = [range(starts[number], starts[number + 1]) for number in numbers]
        kept = torch.tensor([position for span in spans for position in span], device=self.input_ids.device)
        place = torch.full_like(self.input_ids, -1)
        place[kept] = torch.arange(len(kept), device=kept.device)
        moved = place.tolist()
        chosen = [[moved[p] for p in positions] for positions in self.layout.sequences() if moved[positions[0]] >= 0]
        layout = build_layout(chosen, len(kept), grouped=True).to(self.input_ids.device)
        return TokenBatch(self.input_ids[kept], self.position_ids[kept], layout)

    def divide(self, parts: int) -> tuple["PackedBatch | None", ...]:
        """Cut the batch into parts of nearly the same number of examples, in order; ``None`` for a part without any."""
        if parts == 1:
            return (self,)
        return self._between([self.num_examples * part // parts for part in range(parts + 1)])

    def cut(self, max_tokens: int | None) -> tuple["PackedBatch", ...]:
        """Cut the batch, in order, into parts of so many tokens at most; a longer example is a part of its own."""
        if max_tokens is None or self.num_tokens <= max_tokens or self.num_examples == 1:
            return (self,)
        bounds, used = [0], 0
        for number, size in enumerate(self.example_tokens):
            if used and used + size > max_tokens:
                bounds.append(number)
                used = 0
            used += size
        return tuple(part for part in self._between([*bounds, self.num_examples]) if part is not None)

    def _between(self, bounds: Sequence[int]) -> tuple["PackedBatch | None", ...]:
        """The examples from each bound to the next; ``None`` where there are none."""
        examples = [range(first, stop) for first, stop in pairwise(bounds)]
        tokens = [0, *accumulate(sum(self.example_tokens[n] for n in numbers) for numbers in examples)]
        # everything is in the order of the examples, so that a part of it is a slice
        candidates = torch.searchsorted(self.candidate_example, torch.tensor(bounds, device=self.gold.device)).tolist()
        answers = torch.searchsorted(self.token_candidate, torch.tensor(candidates, device=self.gold.device)).tolist()
        needed = torch.searchsorted(self.needed, torch.tensor(tokens, device=self.gold.device)).tolist()
        return tuple(
            None
            if not numbers
            else replace(
                self,
                **vars(self.select(numbers)),
                example_index=self.example_index[numbers.start : numbers.stop],
                example_tokens=self.example_tokens[numbers.start : numbers.stop],
                needed=self.needed[needed[n] : needed[n + 1]] - tokens[n],
                token_needed=self.token_needed[answers[n] : answers[n + 1]] - needed[n],
                token_id=self.token_id[answers[n] : answers[n + 1]],
                token_candidate=self.token_candidate[answers[n] : answers[n + 1]] - candidates[n],
                candidate_length=self.candidate_length[candidates[n] : candidates[n + 1]],
                candidate_example=self.candidate_example[candidates[n] : candidates[n + 1]] - numbers.start,
                candidate_slot=self.candidate_slot[candidates[n] : candidates[n + 1]],
                gold=self.gold[numbers.start : numbers.stop],
                right=self.right[candidates[n] : candidates[n + 1]],
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


def _num_shared(example: EncodedExample, share: bool) -> int:
    """Number of leading tokens that all candidates have in common, never reaching into an answer."""
    if not share and len(example.sequences) > 1:
        return 0
    limit = min(len(sequence.ids) - sequence.num_answer for sequence in example.sequences)
    first = example.sequences[0].ids
    for sequence in example.sequences[1:]:
        if sequence.ids[:limit] != first[:limit]:
            limit = next(i for i in range(limit) if sequence.ids[i] != first[i])
    return limit


def packed_length(example: EncodedExample, share_prompts: bool = True) -> int:
    """Packed tokens of an example: those that its candidates share, and what each adds, without its last."""
    shared = _num_shared(example, share_prompts)
    return shared + sum(len(sequence.ids) - 1 - shared for sequence in example.sequences)


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
    needed: dict[int, int] = {}
    token_needed: list[int] = []
    example_tokens: list[int] = []
    for example in examples:
        start = len(ids)
        shared = _num_shared(example, share_prompts)
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
            # the logits before a token predict it
            token_needed += [needed.setdefault(places[own], len(needed)) for own in sequence.places]
        example_tokens.append(len(ids) - start)
    candidates = [candidate for example in examples for candidate in example.sequences]
    token_id = [candidate.ids[own] for candidate in candidates for own in candidate.places]
    lengths = [len(candidate.places) for candidate in candidates]
    owners = [number for number, example in enumerate(examples) for _ in example.sequences]
    slots = [slot for example in examples for slot in range(len(example.sequences))]
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
        needed=tensor(list(needed)),
        token_needed=tensor(token_needed),
        token_id=tensor(token_id),
        token_candidate=tensor([number for number, length in enumerate(lengths) for _ in range(length)]),
        candidate_length=tensor(lengths),
        candidate_example=tensor(owners),
        candidate_slot=tensor(slots),
        gold=tensor([example.gold[0] if example.gold else -1 for example in examples]),
        right=torch.tensor([slot in examples[owner].gold for slot, owner in zip(slots, owners, strict=True)]),
        choice_ids=tensor(choices) if one_token else None,
        token_choice=tensor([place[token] for token in token_id]) if one_token else None,
        most_candidates=max(slots) + 1,
    )


@dataclass(frozen=True)
class Block:
    """Examples of one forward pass: matrix products of another height round otherwise.

    Attributes:
        examples: In the order in which they are packed.
        share_prompts: As in :func:`slzo.batches.packing.pack`.
    """

    examples: Sequence[EncodedExample]
    share_prompts: bool = True

    @property
    def keys(self) -> tuple[int, ...]:
        """Cache key of each example."""
        return tuple(example.index for example in self.examples)

    @property
    def num_tokens(self) -> int:
        """Packed tokens."""
        return sum(packed_length(example, self.share_prompts) for example in self.examples)

    def pack(self) -> PackedBatch:
        """The batch."""
        return pack(self.examples, share_prompts=self.share_prompts)
