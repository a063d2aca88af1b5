"""Answers to many prompts, at one or several points of the weights at once.

The points differ in some layers only. Below these, answers to one prompt are one computation as long as their tokens are the
same: a *history* is a prompt with the tokens after it, and it forks where two answers part. In the layers that differ each point
runs its answers; above them all answers are one batch. An answer that ended leaves all of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from slzo.batches.encoded import EncodedExample, prompt_with_gold
from slzo.batches.losses import LossSum, add_up, answer_loss
from slzo.batches.packing import PackedBatch, TokenBatch, pack
from slzo.batches.sharing import chunk_by_tokens, common_beginnings
from slzo.evaluation.key_values import Buffer, KeyValues, NewTokens, keeping_attention
from slzo.evaluation.prompt_states import PromptStates, recorded, run_with
from slzo.evaluation.sampling import Sampling
from slzo.models.parts import ModelParts


class Wanted(NamedTuple):
    """An answer that is wanted: to which prompt, at which point."""

    prompt: int
    point: int = 0


@dataclass(frozen=True)
class VariedLayers:
    """Layers whose weights differ from point to point.

    Attributes:
        start: First of them.
        stop: One past the last of them.
        write: Makes a point's weights the live ones, by its number.
    """

    start: int
    stop: int
    write: Callable[[int], None]


@dataclass(frozen=True)
class Kept:
    """States of prompts that are kept from earlier.

    Attributes:
        states: Where they are, and the layer that they enter.
        keys: The cache key of each prompt.
        keep: Whether those that are computed now are kept.
    """

    states: PromptStates
    keys: Sequence[int]
    keep: bool = True


class _Logits(NamedTuple):
    """Of each answer's next token, shape (answers, vocabulary), float32."""

    answers: list[int]
    values: Tensor

    def tokens(self, position: int, sampling: Sampling | None) -> dict[int, int]:
        """The token of each answer at a position of it: the likeliest, or a sampled one."""
        values = self.values if sampling is None else sampling.disturbed(self.values, self.answers, position)
        return dict(zip(self.answers, values.argmax(dim=-1).tolist(), strict=True))


class _Stage:
    """Some layers, and the keys and values of the rows that run through them."""

    def __init__(self, parts: ModelParts, start: int, stop: int, lengths: Mapping[int, int], num_new: int) -> None:
        self.parts, self.start, self.stop = parts, start, stop
        self.buffers = Buffer.of(lengths, num_new, parts.model.device)

    @property
    def rows(self) -> list[int]:
        """The rows, in the order in which they run."""
        return [row for buffer in self.buffers for row in buffer.rows]

    def record(self, batch: TokenBatch, hidden: Tensor | None) -> tuple[Tensor, KeyValues]:
        """Run packed prompts; returns the states after the layers, and the keys and values in them."""
        return recorded(self.parts, batch, self.start, self.stop, hidden)

    def fill(self, states: KeyValues, positions: Mapping[int, Tensor]) -> None:
        """Put keys and values at packed positions into rows."""
        for buffer in self.buffers:
            buffer.fill(states, positions)

    def remove(self, finished: set[int]) -> None:
        """Forget rows."""
        for buffer in self.buffers:
            buffer.remove(finished)
        self.buffers = [buffer for buffer in self.buffers if buffer.rows]

    def fork(self, row: int, new: int) -> None:
        """Add a row that has seen what another one has."""
        next(buffer for buffer in self.buffers if row in buffer.rows).fork(row, new)

    def advance(self, newest: Mapping[int, int], hidden: Tensor | None) -> Tensor:
        """One more token of each row; states (rows, hidden) in their order."""
        new = NewTokens(self.buffers)
        ids = torch.tensor([newest[row] for row in self.rows], device=new.positions.device)
        # attention is ``new``'s own, and nothing looks at a layout
        tokens = TokenBatch(ids, new.positions, None)  # type: ignore[arg-type]
        output = run_with(self.parts, tokens, new.attend, self.start, self.stop, hidden)
        for buffer in self.buffers:
            buffer.lengths += 1
        return output


class _Histories:
    """What answers have in common in the layers below the varied ones; histories are numbered, the prompts come first."""

    def __init__(self, stage: _Stage, wanted: Sequence[Wanted]) -> None:
        self.stage = stage
        self._of = {answer: want.prompt for answer, want in enumerate(wanted)}
        self._next = max(self._of.values()) + 1

    def advance(self, tokens: Mapping[int, int], order: Sequence[int]) -> Tensor:
        """One more token of each answer, in a given order of them; states (answers, hidden)."""
        newest: dict[int, int] = {}
        found: dict[tuple[int, int], int] = {}
        for answer, token in tokens.items():
            own = (self._of[answer], token)
            if own not in found:
                found[own] = own[0] if own[0] not in newest else self._fork(own[0])
                newest[found[own]] = token
            self._of[answer] = found[own]
        self.stage.remove(set(self.stage.rows) - newest.keys())
        hidden = self.stage.advance(newest, None)
        return _pick_rows(hidden, self.stage.rows, [self._of[answer] for answer in order])

    def _fork(self, history: int) -> int:
        self.stage.fork(history, self._next)
        self._next += 1
        return self._next - 1


def _pick_rows(hidden: Tensor, rows: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """States of rows in another order."""
    if list(wanted) == list(rows):
        return hidden
    place = {row: number for number, row in enumerate(rows)}
    return hidden.index_select(0, torch.tensor([place[row] for row in wanted], device=hidden.device))


@dataclass
class _Decoder:
    """The model in stages: below the varied layers, these for each point, and above them."""

    parts: ModelParts
    prompts: Sequence[Sequence[int]]
    wanted: Sequence[Wanted]
    num_new: int
    max_tokens: int
    varied: VariedLayers | None
    kept: Kept | None
    below: _Histories | None = field(init=False, default=None)
    points: dict[int, _Stage] = field(init=False, default_factory=dict)
    above: _Stage | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        parts, varied, kept, last = self.parts, self.varied, self.kept, self.parts.num_layers
        start = varied.start if varied is not None else 0 if kept is None else kept.states.start
        stop = start if varied is None else varied.stop
        lengths = {answer: len(self.prompts[want.prompt]) for answer, want in enumerate(self.wanted)}
        if start > 0:
            asked = {want.prompt: len(self.prompts[want.prompt]) for want in self.wanted}
            self.below = _Histories(_Stage(parts, 0, start, asked, self.num_new), self.wanted)
        if varied is not None:
            for point in sorted({want.point for want in self.wanted}):
                own = {answer: lengths[answer] for answer, want in enumerate(self.wanted) if want.point == point}
                self.points[point] = _Stage(parts, start, stop, own, self.num_new)
        if stop < last:
            self.above = _Stage(parts, stop, last, lengths, self.num_new)

    def chunks(self) -> Iterator[tuple[list[int], list[int], bool]]:
        """Prompts that run together, the points that ask for them, and whether their states are kept."""
        points: dict[int, set[int]] = {}
        for prompt, point in self.wanted:
            points.setdefault(prompt, set()).add(point)
        kept = {prompt: self._is_kept(prompt) for prompt in points}

        def of(prompt: int) -> tuple[list[int], bool]:
            return sorted(points[prompt]), kept[prompt]

        order = sorted(points, key=lambda prompt: (of(prompt), tuple(self.prompts[prompt])))
        for (own, held), group in groupby(order, key=of):
            rows = list(group)
            for chunk in chunk_by_tokens([self.prompts[row] for row in rows], max(1, self.max_tokens // len(own))):
                yield [rows[number] for number in chunk], own, held

    def _is_kept(self, prompt: int) -> bool:
        if self.kept is None:
            return False
        key, cache = self.kept.keys[prompt], self.kept.states.cache
        return key in cache or (self.kept.keep and cache.wants(key))

    def prefill(
        self, rows: list[int], points: list[int], held: bool, gold: Sequence[EncodedExample] | None
    ) -> tuple["_Logits", LossSum | None]:
        """Run prompts; returns the logits of each answer's first token, and the loss of the gold answers."""
        keys = rows if self.kept is None else [self.kept.keys[row] for row in rows]
        encoded = [
            prompt_with_gold(key, tuple(self.prompts[row]), None if gold is None else gold[row])
            for key, row in zip(keys, rows, strict=True)
        ]
        packed, device = pack(encoded), self.parts.model.device
        shared, source = common_beginnings(packed)
        batch = shared.to(device)
        last = batch.token_needed[batch.candidate_slot[batch.token_candidate] == 0]
        positions = dict(zip(rows, batch.layout.sequences_up_to(batch.needed[last]), strict=True))
        hidden = None
        if self.below is not None and held:
            assert self.kept is not None
            own = packed.to(device)
            states, below = self.kept.states.of(own, self.kept.keep, self.max_tokens)
            hidden = states.index_select(0, source.to(device))
            self.below.stage.fill(below, dict(zip(rows, own.layout.sequences_up_to(own.needed[last]), strict=True)))
        elif self.below is not None:
            hidden, below = self.below.stage.record(batch, None)
            self.below.stage.fill(below, positions)
        final, answers = self._prefill_above(batch, hidden, positions, points)
        needed = torch.cat([batch.needed + copy * batch.num_tokens for copy in range(len(points))])
        logits = self.parts.head(final.index_select(0, needed)).split(batch.needed.numel())
        loss = None if gold is None else answer_loss(logits[0], batch)
        first = torch.cat([own.index_select(0, last) for own in logits])
        place = {row: number for number, row in enumerate(rows)}
        chosen = [copy * len(rows) + place[row] for copy, row in answers.values()]
        return _Logits(list(answers), first.index_select(0, torch.tensor(chosen, device=device))), loss

    def _prefill_above(
        self, batch: PackedBatch, hidden: Tensor | None, positions: Mapping[int, Tensor], points: list[int]
    ) -> tuple[Tensor, dict[int, tuple[int, int]]]:
        """Final states, the points one after the other, and for each answer which of them it is at and its prompt."""
        copy_of = {point: copy for copy, point in enumerate(points)}
        answers = {
            answer: (copy_of[want.point], want.prompt)
            for answer, want in enumerate(self.wanted)
            if want.prompt in positions and want.point in copy_of
        }
        if self.points:
            outputs = []
            for copy, point in enumerate(points):
                self._write(point)
                output, states = self.points[point].record(batch, hidden)
                own = {answer: positions[row] for answer, (number, row) in answers.items() if number == copy}
                self.points[point].fill(states, own)
                outputs.append(output)
            hidden = torch.cat(outputs)
        if self.above is None:
            assert hidden is not None
            return hidden, answers
        hidden, states = self.above.record(batch.repeat(len(points)) if len(points) > 1 else batch, hidden)
        self.above.fill(
            states, {answer: positions[row] + copy * batch.num_tokens for answer, (copy, row) in answers.items()}
        )
        return hidden, answers

    def advance(self, tokens: Mapping[int, int]) -> "_Logits":
        """Logits after one more token of each answer."""
        orders = {point: stage.rows for point, stage in self.points.items() if stage.buffers}
        if self.above is not None and not orders:
            order = self.above.rows
        else:
            order = [answer for own in orders.values() for answer in own]
        hidden = None if self.below is None else self.below.advance(tokens, order)
        if orders:
            inputs = [None] * len(orders) if hidden is None else hidden.split([len(own) for own in orders.values()])
            outputs = []
            for point, own in zip(orders, inputs, strict=True):
                self._write(point)
                outputs.append(self.points[point].advance(tokens, own))
            hidden = torch.cat(outputs)
        if self.above is not None:
            rows = self.above.rows
            hidden = self.above.advance(tokens, None if hidden is None else _pick_rows(hidden, order, rows))
            order = rows
        assert hidden is not None
        return _Logits(order, self.parts.head(hidden))

    def remove(self, finished: set[int]) -> None:
        """Forget answers; histories go when no answer needs them."""
        for stage in (*self.points.values(), *(() if self.above is None else (self.above,))):
            stage.remove(finished)

    def _write(self, point: int) -> None:
        assert self.varied is not None
        self.varied.write(point)


def decode(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[Wanted],
    stops: set[int],
    *,
    max_new_tokens: int,
    prefill_tokens: int = 1024,
    ended: Callable[[Sequence[int]], bool] | None = None,
    sampling: Sampling | None = None,
    varied: VariedLayers | None = None,
    kept: Kept | None = None,
    gold: Sequence[EncodedExample] | None = None,
) -> tuple[list[list[int]], LossSum | None]:
    """The tokens of each answer that is wanted, the stop token left out, and the loss of the gold answers.

    Args:
        parts: The model, packed.
        prompts: Token ids, at least one each.
        wanted: Which answers; a prompt may be wanted several times.
        stops: Tokens that end an answer.
        max_new_tokens: Longest answer, >= 1.
        prefill_tokens: Prompt tokens per forward pass, over all points.
        ended: Whether an answer's tokens so far end it.
        sampling: Draws the tokens, one key per answer; ``None``: the likeliest are taken.
        varied: Where the points differ; without, all are at the live weights. These are at one of the points afterwards.
        kept: States of the prompts below the first varied layer, or below the layer that they enter.
        gold: Gold answers after their prompts, one example per prompt, for their loss; with one point only.
    """
    answers: list[list[int]] = [[] for _ in wanted]
    if not wanted:
        return answers, None
    losses: list[LossSum] = []
    tokens: dict[int, int] = {}
    with keeping_attention(parts):
        decoder = _Decoder(parts, prompts, wanted, max_new_tokens, prefill_tokens, varied, kept)
        for rows, points, held in decoder.chunks():
            logits, loss = decoder.prefill(rows, points, held, gold)
            tokens |= logits.tokens(0, sampling)
            losses += [] if loss is None else [loss]
        for step in range(max_new_tokens):
            finished = {answer for answer, token in tokens.items() if token in stops}
            for answer in tokens.keys() - finished:
                answers[answer].append(tokens[answer])
            if ended is not None:
                finished |= {answer for answer in tokens.keys() - finished if ended(answers[answer])}
            decoder.remove(finished)
            tokens = {answer: token for answer, token in tokens.items() if answer not in finished}
            if not tokens or step == max_new_tokens - 1:
                break
            tokens = decoder.advance(tokens).tokens(step + 1, sampling)
    return answers, add_up(losses) if losses else None
