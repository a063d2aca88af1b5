"""Generate answers to many prompts, greedily or by sampling, with the weights at one or several points at once.

Prompts run packed, and a common beginning runs once. Decoding then feeds one token per unfinished answer. Keys and values are
stored in buffers of rows of similar length, so that attention covers little padding.

The weights of the points differ only in some layers. Below these layers, answers to the same prompt share one computation as
long as their tokens are equal. A *history* is a prompt with the tokens generated after it; it forks where two answers differ.
In the layers that differ, each point runs its own answers. Above them, all answers run as one batch. A finished answer is
removed from every stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from slzo.batches.chunks import chunk_by_tokens, shared_beginnings
from slzo.batches.encoded import EncodedExample, prompt_with_gold
from slzo.batches.layout import NO_SEQUENCES
from slzo.batches.losses import answer_losses
from slzo.batches.packing import PackedBatch, TokenBatch, pack
from slzo.batches.sharing import share_beginnings
from slzo.evaluation.generation import Ended, generate_padded
from slzo.evaluation.key_values import Buffer, NewTokens, check_places
from slzo.evaluation.prompt_states import PromptStates
from slzo.evaluation.sampling import Sampling
from slzo.models.attention import KeyValues
from slzo.models.logits import needed_logits
from slzo.models.parts import ModelParts
from slzo.models.recorded import recorded
from slzo.tasks.base import MAX_NEW_TOKENS


@dataclass(frozen=True)
class VariedLayers:
    """Layers whose weights differ from point to point.

    Attributes:
        start: First layer.
        stop: One past the last layer.
        num_points: Number of points.
        write: Makes the weights of a point live.
    """

    start: int
    stop: int
    num_points: int
    write: Callable[[int], None]


@dataclass(frozen=True)
class CachedPrompts:
    """Cached states of prompts, with the key of each prompt; newly computed states are added if ``keep`` is set."""

    states: PromptStates
    keys: Sequence[int]
    keep: bool = True


@dataclass(frozen=True)
class EnteringStates:
    """States that enter the varied layers, one per token that was run, recorded while answers are generated.

    Attributes:
        prompts: States of each prompt, shape (its tokens, hidden), by its number.
        answers: States of each answer's tokens but the last, each of shape (hidden,), by its number.
    """

    prompts: dict[int, Tensor] = field(default_factory=dict)
    answers: dict[int, list[Tensor]] = field(default_factory=dict)

    def of(self, prompt: int, answers: Sequence[int]) -> Tensor:
        """Return the states of a prompt and, after them, of some answers one by one, shape (tokens, hidden)."""
        own = [state[None] for answer in answers for state in self.answers.get(answer, ())]
        return torch.cat([self.prompts[prompt], *own])


class _Logits(NamedTuple):
    """Logits of each answer's next token, shape (answers, vocabulary), float32."""

    answers: list[int]
    values: Tensor

    def tokens(self, position: int, sampling: Sampling | None) -> dict[int, int]:
        """Return the token of each answer at this position of the answer: the most likely one, or a sampled one."""
        values = self.values if sampling is None else sampling.with_noise(self.values, self.answers, position)
        return dict(zip(self.answers, values.argmax(dim=-1).tolist(), strict=True))


class _Stage:
    """A range of layers, with the keys and values of the rows that run through them."""

    def __init__(self, parts: ModelParts, start: int, stop: int, lengths: Mapping[int, int], num_new: int) -> None:
        self.parts, self.start, self.stop = parts, start, stop
        self.buffers = Buffer.of(lengths, num_new, parts.model.device)

    @property
    def rows(self) -> list[int]:
        """The rows, in the order in which they run."""
        return [row for buffer in self.buffers for row in buffer.rows]

    def prefill(self, batch: TokenBatch, hidden: Tensor | None, positions: Mapping[int, Tensor]) -> Tensor:
        """Run packed prompts, store the keys and values of each row's prompt, and return the states after the last layer."""
        output, states = recorded(self.parts, batch, self.start, self.stop, hidden)
        self.fill(states, positions)
        return output

    def fill(self, states: KeyValues, positions: Mapping[int, Tensor]) -> None:
        """Store each row's keys and values, which are at the given packed positions of ``states``."""
        for buffer in self.buffers:
            buffer.fill(states, positions)

    def remove(self, finished: set[int]) -> None:
        for buffer in self.buffers:
            buffer.remove(finished)
        self.buffers = [buffer for buffer in self.buffers if buffer.rows]

    def fork(self, row: int, new: int) -> None:
        """Add the row ``new`` as a copy of ``row``."""
        next(buffer for buffer in self.buffers if row in buffer.rows).fork(row, new)

    def advance(self, newest: Mapping[int, int], hidden: Tensor | None) -> Tensor:
        """Run one more token of each row; return its states, shape (rows, hidden), in the order of the rows."""
        new = NewTokens(self.buffers)
        ids = torch.tensor([newest[row] for row in self.rows], device=new.positions.device)
        tokens = TokenBatch(ids, new.positions, NO_SEQUENCES)
        output = self.parts.run(tokens, self.start, self.stop, hidden, attend=new.attend)
        for buffer in self.buffers:
            buffer.lengths += 1
        return output


class _Histories:
    """Histories of the answers in the layers below the varied ones; a prompt's first history has the number of the prompt."""

    def __init__(self, stage: _Stage, prompt_of: Sequence[int]) -> None:
        self.stage = stage
        self._history_of = dict(enumerate(prompt_of))
        self._next = max(prompt_of) + 1

    def advance(self, tokens: Mapping[int, int], order: Sequence[int]) -> Tensor:
        """Run one more token of each answer; return the states of the answers in ``order``, shape (answers, hidden)."""
        newest: dict[int, int] = {}  # by history
        continued: dict[tuple[int, int], int] = {}  # by the history so far and its next token
        for answer, token in tokens.items():
            history = self._history_of[answer]
            if (history, token) not in continued:
                new = history
                if history in newest:
                    new, self._next = self._next, self._next + 1
                    self.stage.fork(history, new)
                continued[history, token] = new
                newest[new] = token
            self._history_of[answer] = continued[history, token]
        self.stage.remove(set(self.stage.rows) - newest.keys())
        hidden = self.stage.advance(newest, None)
        return _pick_rows(hidden, self.stage.rows, [self._history_of[answer] for answer in order])


def _pick_rows(hidden: Tensor, rows: Sequence[int], order: Sequence[int]) -> Tensor:
    """Reorder the states of ``rows``; a row may occur in ``order`` several times."""
    if list(order) == list(rows):
        return hidden
    place = {row: number for number, row in enumerate(rows)}
    return hidden.index_select(0, torch.tensor([place[row] for row in order], device=hidden.device))


@dataclass
class _Decoder:
    """The model in stages: the layers below the varied ones, the varied layers once per point, and the layers above.

    ``prompt_of`` has the number of each answer's prompt, those of one point after the other.
    """

    parts: ModelParts
    prompts: Sequence[Sequence[int]]
    prompt_of: Sequence[int]
    num_new: int
    max_tokens: int
    varied: VariedLayers | None
    kept: CachedPrompts | None
    entering: EnteringStates | None
    below: _Histories | None = field(init=False, default=None)
    points: dict[int, _Stage] = field(init=False, default_factory=dict)
    above: _Stage | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        parts, varied, kept, last = self.parts, self.varied, self.kept, self.parts.num_layers
        start = varied.start if varied is not None else 0 if kept is None else kept.states.cache.start
        stop = start if varied is None else varied.stop
        lengths = [len(self.prompts[prompt]) for prompt in self.prompt_of]
        if start > 0:
            of_prompts = dict(zip(self.prompt_of, lengths, strict=True))
            self.below = _Histories(_Stage(parts, 0, start, of_prompts, self.num_new), self.prompt_of)
        if varied is not None:
            for point, answers in enumerate(self._answers_by_point):
                of_point = {answer: lengths[answer] for answer in answers}
                self.points[point] = _Stage(parts, start, stop, of_point, self.num_new)
        if stop < last:
            self.above = _Stage(parts, stop, last, dict(enumerate(lengths)), self.num_new)

    @property
    def num_points(self) -> int:
        """Number of points; 1 if no layers are varied."""
        return 1 if self.varied is None else self.varied.num_points

    @property
    def _answers_by_point(self) -> list[range]:
        """Numbers of the answers of each point."""
        count = len(self.prompt_of) // self.num_points
        return [range(point * count, (point + 1) * count) for point in range(self.num_points)]

    def chunks(self) -> Iterator[tuple[list[int], bool]]:
        """Yield prompts that run together, and whether their states are or will be cached."""
        is_cached = {prompt: self._is_cached(prompt) for prompt in self.prompt_of}
        order = sorted(is_cached, key=lambda prompt: (is_cached[prompt], tuple(self.prompts[prompt])))
        max_tokens = max(1, self.max_tokens // self.num_points)
        for cached, group in groupby(order, key=is_cached.__getitem__):
            rows = list(group)
            prompts = [self.prompts[row] for row in rows]
            for chunk in chunk_by_tokens([*map(len, prompts)], max_tokens, shared=shared_beginnings(prompts)):
                yield [rows[number] for number in chunk], cached

    def _is_cached(self, prompt: int) -> bool:
        if self.kept is None:
            return False
        key, cache = self.kept.keys[prompt], self.kept.states.cache
        return key in cache or (self.kept.keep and cache.wants(key))

    def prefill(
        self, rows: list[int], cached: bool, gold: Sequence[EncodedExample] | None
    ) -> tuple[_Logits, Tensor | None]:
        """Run prompts; return the logits of each answer's first token, and the loss of the gold answers."""
        keys = rows if self.kept is None else [self.kept.keys[row] for row in rows]
        encoded = [
            prompt_with_gold(key, tuple(self.prompts[row]), None if gold is None else gold[row])
            for key, row in zip(keys, rows, strict=True)
        ]
        packed, device = pack(encoded), self.parts.model.device
        shared, source = share_beginnings(packed)
        batch = shared.to(device)
        last = batch.token_needed[batch.candidate_slot[batch.token_candidate] == 0]
        positions = dict(zip(rows, batch.layout.sequences_up_to(batch.needed[last]), strict=True))
        hidden = None
        if self.below is not None and cached:  # the cache holds whole prompts, which share no tokens
            assert self.kept is not None
            unshared = packed.to(device)
            states, below = self.kept.states.of(unshared, self.kept.keep, self.max_tokens)
            hidden = states.index_select(0, source.to(device))
            sequences = unshared.layout.sequences_up_to(unshared.needed[last])
            self.below.stage.fill(below, dict(zip(rows, sequences, strict=True)))
        elif self.below is not None:
            hidden = self.below.stage.prefill(batch, None, positions)
        if self.entering is not None and hidden is not None:
            self.entering.prompts.update({row: hidden.index_select(0, where) for row, where in positions.items()})
        final, answers = self._prefill_above(batch, hidden, positions)
        needed = torch.cat([batch.needed + point * batch.num_tokens for point in range(self.num_points)])
        logits = self.parts.head(final.index_select(0, needed)).split(batch.needed.numel())
        loss = None if gold is None else answer_losses(logits[0], batch).sum()
        first = torch.cat([of_point.index_select(0, last) for of_point in logits])
        place = {row: number for number, row in enumerate(rows)}
        chosen = [point * len(rows) + place[row] for point, row in answers.values()]
        return _Logits(list(answers), first.index_select(0, torch.tensor(chosen, device=device))), loss

    def _prefill_above(
        self, batch: PackedBatch, hidden: Tensor | None, positions: Mapping[int, Tensor]
    ) -> tuple[Tensor, dict[int, tuple[int, int]]]:
        """Return the final states, one point after the other, and for each answer its point and its prompt."""
        answers = {
            answer: (point, self.prompt_of[answer])
            for point, of_point in enumerate(self._answers_by_point)
            for answer in of_point
            if self.prompt_of[answer] in positions
        }
        if self.points:
            outputs = []
            for point, stage in self.points.items():
                self._write(point)
                own = {answer: positions[row] for answer, (at, row) in answers.items() if at == point}
                outputs.append(stage.prefill(batch, hidden, own))
            hidden = torch.cat(outputs)
        if self.above is None:
            assert hidden is not None
            return hidden, answers
        of_copies = {answer: positions[row] + point * batch.num_tokens for answer, (point, row) in answers.items()}
        return self.above.prefill(batch.repeat(self.num_points), hidden, of_copies), answers

    def advance(self, tokens: Mapping[int, int]) -> _Logits:
        """Run one more token of each answer and return the logits of the next one."""
        orders = {point: stage.rows for point, stage in self.points.items() if stage.buffers}
        if self.above is not None and not orders:
            order = self.above.rows
        else:
            order = [answer for answers in orders.values() for answer in answers]
        hidden = None if self.below is None else self.below.advance(tokens, order)
        if self.entering is not None and hidden is not None:
            for answer, state in zip(order, hidden, strict=True):
                self.entering.answers.setdefault(answer, []).append(state)
        if orders:
            sizes = [len(answers) for answers in orders.values()]
            inputs = [None] * len(orders) if hidden is None else hidden.split(sizes)
            outputs = []
            for point, states in zip(orders, inputs, strict=True):
                self._write(point)
                outputs.append(self.points[point].advance(tokens, states))
            hidden = torch.cat(outputs)
        if self.above is not None:
            rows = self.above.rows
            hidden = self.above.advance(tokens, None if hidden is None else _pick_rows(hidden, order, rows))
            order = rows
        assert hidden is not None
        return _Logits(order, self.parts.head(hidden))

    def remove(self, finished: set[int]) -> None:
        """Remove answers; a history that no answer needs is removed at the next token."""
        for stage in (*self.points.values(), *(() if self.above is None else (self.above,))):
            stage.remove(finished)

    def _write(self, point: int) -> None:
        assert self.varied is not None
        self.varied.write(point)


class Decoded(NamedTuple):
    """Generated answers, those of one point after the other.

    Attributes:
        answers: Tokens of each answer, without the stop token.
        ends: Stop token of each answer; ``None`` if it ended otherwise.
        gold: Total loss of the gold answers' tokens and their number, shape (2,); ``None`` if no gold answers were given.
    """

    answers: list[list[int]]
    ends: list[int | None]
    gold: Tensor | None


@torch.no_grad()
def generate(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    *,
    prompt_of: Sequence[int] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    prefill_tokens: int = 1024,
    ended: Ended | None = None,
    sampling: Sampling | None = None,
    varied: VariedLayers | None = None,
    kept: CachedPrompts | None = None,
    gold: Sequence[EncodedExample] | None = None,
    entering: EnteringStates | None = None,
) -> Decoded:
    """Generate answers.

    Args:
        parts: The model. If it is not packed, only one answer to each prompt with the live weights can be generated.
        prompts: Token ids of each prompt, at least one id each.
        stops: Tokens that end an answer, see :func:`slzo.evaluation.generation.stop_tokens`.
        prompt_of: Number of the prompt of each answer at a point. The same prompt may occur several times. ``None`` for one
            answer to each prompt.
        max_new_tokens: Longest answer, in tokens, >= 1.
        prefill_tokens: Prompt tokens per forward pass, summed over the points.
        ended: Function that says whether an answer's tokens so far end it.
        sampling: Samples the tokens, with one key per answer; ``None`` takes the most likely token.
        varied: Layers that differ between the points. Afterwards the live weights are those of one of the points. ``None``
            uses the live weights for all answers.
        kept: Cached states of the prompts; they enter the first varied layer, or any layer if none is varied.
        gold: Examples whose gold answers' loss is computed in the same passes, one per prompt; with one point only.
        entering: Records the states that enter the varied layers, unless these are the first ones; with one point only.
    """
    if not parts.packed:
        loss = None if gold is None else _gold_loss(parts, gold, prefill_tokens)
        made = generate_padded(parts, prompts, stops, max_new_tokens, ended, sampling)
        return Decoded([answer for answer, _ in made], [end for _, end in made], loss)
    prompt_of = list(range(len(prompts)) if prompt_of is None else prompt_of) * (
        1 if varied is None else varied.num_points
    )
    answers: list[list[int]] = [[] for _ in prompt_of]
    ends: list[int | None] = [None] * len(prompt_of)
    if not prompt_of:
        return Decoded(answers, ends, None)
    losses: list[Tensor] = []
    tokens: dict[int, int] = {}
    check_places(parts)
    decoder = _Decoder(parts, prompts, prompt_of, max_new_tokens, prefill_tokens, varied, kept, entering)
    for rows, cached in decoder.chunks():
        logits, loss = decoder.prefill(rows, cached, gold)
        tokens |= logits.tokens(0, sampling)
        if loss is not None:
            losses.append(loss)
    for step in range(max_new_tokens):
        finished = {answer for answer, token in tokens.items() if token in stops}
        for answer in finished:
            ends[answer] = tokens[answer]
        for answer in tokens.keys() - finished:
            answers[answer].append(tokens[answer])
        if ended is not None:
            finished |= {answer for answer in tokens.keys() - finished if ended(answers[answer])}
        decoder.remove(finished)
        tokens = {answer: token for answer, token in tokens.items() if answer not in finished}
        if not tokens or step == max_new_tokens - 1:
            break
        tokens = decoder.advance(tokens).tokens(step + 1, sampling)
    return Decoded(answers, ends, torch.stack(losses, dim=1).sum(dim=1) if losses else None)


def _gold_loss(parts: ModelParts, gold: Sequence[EncodedExample], max_tokens: int) -> Tensor:
    losses = []
    known = [example for example in gold if example.gold]
    for chunk in chunk_by_tokens([len(example.sequences[0].ids) for example in known], max_tokens):
        batch = pack([known[number] for number in chunk]).to(parts.model.device)
        losses.append(answer_losses(needed_logits(parts, batch), batch).sum())
    return torch.stack(losses, dim=1).sum(dim=1) if losses else torch.zeros(2, device=parts.model.device)
