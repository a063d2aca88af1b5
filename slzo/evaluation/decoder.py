"""Batched generation with cached keys and values, with the weights at one or several points at once.

The layers run in stages. The weights of the points differ only in some layers. Below these layers, answers to the same prompt
share one computation as long as their tokens are equal. A *history* is a prompt with the tokens generated after it; it forks
where two answers differ. In the layers that differ, each point runs its own answers. Above them, all answers run as one batch.
A finished answer is removed from every stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from slzo.batches.chunks import chunk_by_tokens, shared_beginnings
from slzo.batches.encoded import EncodedExample, prompt_with_gold
from slzo.batches.losses import RowLosses, answer_losses
from slzo.batches.packing import PackedBatch, pack
from slzo.batches.sharing import share_beginnings
from slzo.evaluation.prompt_states import PromptStates
from slzo.evaluation.sampling import Sampling
from slzo.evaluation.stages import AnswerBranches, LayerStage, pick_rows
from slzo.models.parts import ModelParts


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


@dataclass(frozen=True)
class VariedLayers:
    """Layers whose weights differ from point to point.

    Attributes:
        start: First layer.
        stop: One past the last layer.
        num_points: Number of points.
        write: Makes the weights of a point live.
        entering: Records the states that enter the layers, unless these are the first ones; with one point only.
    """

    start: int
    stop: int
    num_points: int
    write: Callable[[int], None]
    entering: EnteringStates | None = None


@dataclass(frozen=True)
class CachedPrompts:
    """Cached states of prompts, with the key of each prompt; newly computed states are added if ``keep`` is set."""

    states: PromptStates
    keys: Sequence[int]
    keep: bool = True


class Logits(NamedTuple):
    """Logits of each answer's next token, shape (answers, vocabulary), float32."""

    answers: list[int]
    values: Tensor

    def tokens(self, position: int, sampling: Sampling | None) -> dict[int, int]:
        """Return the token of each answer at this position of the answer: the most likely one, or a sampled one."""
        values = self.values if sampling is None else sampling.with_noise(self.values, self.answers, position)
        return dict(zip(self.answers, values.argmax(dim=-1).tolist(), strict=True))


@dataclass
class Decoder:
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
    below: AnswerBranches | None = field(init=False, default=None)
    points: dict[int, LayerStage] = field(init=False, default_factory=dict)
    above: LayerStage | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        parts, varied, kept, last = self.parts, self.varied, self.kept, self.parts.num_layers
        start = varied.start if varied is not None else 0 if kept is None else kept.states.cache.start
        stop = start if varied is None else varied.stop
        lengths = [len(self.prompts[prompt]) for prompt in self.prompt_of]
        if start > 0:
            of_prompts = dict(zip(self.prompt_of, lengths, strict=True))
            self.below = AnswerBranches(LayerStage(parts, 0, start, of_prompts, self.num_new), self.prompt_of)
        if varied is not None:
            for point, answers in enumerate(self._answers_by_point):
                of_point = {answer: lengths[answer] for answer in answers}
                self.points[point] = LayerStage(parts, start, stop, of_point, self.num_new)
        if stop < last:
            self.above = LayerStage(parts, stop, last, dict(enumerate(lengths)), self.num_new)

    @property
    def _entering(self) -> EnteringStates | None:
        return None if self.varied is None else self.varied.entering

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
    ) -> tuple[Logits, RowLosses | None]:
        """Run prompts; return the logits of each answer's first token, and the losses of the gold answers."""
        keys = rows if self.kept is None else [self.kept.keys[row] for row in rows]
        encoded = [
            prompt_with_gold(key, tuple(self.prompts[row]), None if gold is None else gold[row])
            for key, row in zip(keys, rows, strict=True)
        ]
        packed, device = pack(encoded), self.parts.model.device
        shared, source = share_beginnings(packed)
        batch = shared.to(device)
        last = batch.token_logit[batch.candidate_slot[batch.token_candidate] == 0]
        positions = dict(zip(rows, batch.layout.sequences_up_to(batch.logit_positions[last]), strict=True))
        hidden = None
        if self.below is not None and cached:  # the cache holds whole prompts, which share no tokens
            assert self.kept is not None
            unshared = packed.to(device)
            states, below = self.kept.states.of(unshared, self.kept.keep, self.max_tokens)
            hidden = states.index_select(0, source.to(device))
            sequences = unshared.layout.sequences_up_to(unshared.logit_positions[last])
            self.below.stage.fill(below, dict(zip(rows, sequences, strict=True)))
        elif self.below is not None:
            hidden = self.below.stage.prefill(batch, None, positions)
        if self._entering is not None and hidden is not None:
            self._entering.prompts.update({row: hidden.index_select(0, where) for row, where in positions.items()})
        final, answers = self._prefill_above(batch, hidden, positions)
        needed = torch.cat([batch.logit_positions + point * batch.num_tokens for point in range(self.num_points)])
        logits = self.parts.head(final.index_select(0, needed)).split(batch.logit_positions.numel())
        losses = None if gold is None else answer_losses(logits[0], batch)
        first = torch.cat([of_point.index_select(0, last) for of_point in logits])
        place = {row: number for number, row in enumerate(rows)}
        chosen = [point * len(rows) + place[row] for point, row in answers.values()]
        return Logits(list(answers), first.index_select(0, torch.tensor(chosen, device=device))), losses

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

    def advance(self, tokens: Mapping[int, int]) -> Logits:
        """Run one more token of each answer and return the logits of the next one."""
        orders = {point: stage.rows for point, stage in self.points.items() if stage.buffers}
        if self.above is not None and not orders:
            order = self.above.rows
        else:
            order = [answer for answers in orders.values() for answer in answers]
        hidden = None if self.below is None else self.below.advance(tokens, order)
        if self._entering is not None and hidden is not None:
            for answer, state in zip(order, hidden, strict=True):
                self._entering.answers.setdefault(answer, []).append(state)
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
            hidden = self.above.advance(tokens, None if hidden is None else pick_rows(hidden, order, rows))
            order = rows
        assert hidden is not None
        return Logits(order, self.parts.head(hidden))

    def remove(self, finished: set[int]) -> None:
        """Remove answers; a history that no answer needs is removed at the next token."""
        for stage in (*self.points.values(), *(() if self.above is None else (self.above,))):
            stage.remove(finished)

    def _write(self, point: int) -> None:
        assert self.varied is not None
        self.varied.write(point)
