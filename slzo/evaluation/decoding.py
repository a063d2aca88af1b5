"""Generate answers to many prompts, greedily or by sampling, with the weights at one or several points at once.

Prompts run packed, and a common beginning runs once. Decoding then feeds one token per unfinished answer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slzo.batches.chunks import chunk_by_tokens
from slzo.batches.encoded import EncodedExample
from slzo.batches.losses import RowLosses, answer_losses
from slzo.batches.packing import pack
from slzo.evaluation.decoder import CachedPrompts, Decoder, VariedLayers
from slzo.evaluation.generation import Ended, generate_padded
from slzo.evaluation.key_values import check_places
from slzo.evaluation.sampling import Sampling
from slzo.models.logits import needed_logits
from slzo.models.parts import ModelParts
from slzo.tasks.base import MAX_NEW_TOKENS

_Losses = tuple[Sequence[int], RowLosses]
"""Prompts by number, and the losses of their gold answers."""


class Decoded(NamedTuple):
    """Generated answers, those of one point after the other.

    Attributes:
        answers: Tokens of each answer, without the stop token.
        ends: Stop token of each answer; ``None`` if it ended otherwise.
        gold: Total loss of the gold answers' tokens and their number, shape (2,); ``None`` if no gold answers were given.
        gold_by_prompt: The same of each prompt with a gold answer, by its number.
    """

    answers: list[list[int]]
    ends: list[int | None]
    gold: Tensor | None
    gold_by_prompt: dict[int, tuple[float, float]]


@torch.no_grad()
def decode(
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
    """
    losses: list[_Losses] = []
    if not parts.packed:
        losses += [] if gold is None else _gold_losses(parts, gold, prefill_tokens)
        made = generate_padded(parts, prompts, stops, max_new_tokens, ended, sampling)
        total = None if gold is None else _total(losses, parts)
        return Decoded([answer for answer, _ in made], [end for _, end in made], total, _by_prompt(losses))
    prompt_of = list(range(len(prompts)) if prompt_of is None else prompt_of) * (
        1 if varied is None else varied.num_points
    )
    answers: list[list[int]] = [[] for _ in prompt_of]
    ends: list[int | None] = [None] * len(prompt_of)
    if not prompt_of:
        return Decoded(answers, ends, None, {})
    tokens: dict[int, int] = {}
    check_places(parts)
    decoder = Decoder(parts, prompts, prompt_of, max_new_tokens, prefill_tokens, varied, kept)
    for rows, cached in decoder.chunks():
        logits, of_rows = decoder.prefill(rows, cached, gold)
        tokens |= logits.tokens(0, sampling)
        if of_rows is not None:
            losses.append((rows, of_rows))
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
    return Decoded(answers, ends, _total(losses, parts) if losses else None, _by_prompt(losses))


def _gold_losses(parts: ModelParts, gold: Sequence[EncodedExample], max_tokens: int) -> list[_Losses]:
    losses: list[_Losses] = []
    known = [number for number, example in enumerate(gold) if example.gold]
    for chunk in chunk_by_tokens([len(gold[number].sequences[0].ids) for number in known], max_tokens):
        rows = [known[place] for place in chunk]
        batch = pack([gold[row] for row in rows]).to(parts.model.device)
        losses.append((rows, answer_losses(needed_logits(parts, batch), batch)))
    return losses


def _total(losses: Sequence[_Losses], parts: ModelParts) -> Tensor:
    if not losses:
        return torch.zeros(2, device=parts.model.device)
    return torch.stack([each.sum() for _, each in losses], dim=1).sum(dim=1)


def _by_prompt(losses: Sequence[_Losses]) -> dict[int, tuple[float, float]]:
    found: dict[int, tuple[float, float]] = {}
    for rows, each in losses:
        pairs = zip(each.totals.tolist(), each.weights.tolist(), strict=True)
        found |= {row: pair for row, pair in zip(rows, pairs, strict=True) if pair[1] > 0}
    return found
