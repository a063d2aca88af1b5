"""Generate answers to many prompts, greedily or by sampling, with the weights at one or several points at once.

Prompts run packed, and a common beginning runs once. Decoding then feeds one token per unfinished answer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

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


class Decoded(NamedTuple):
    """Generated answers, those of one point after the other.

    Attributes:
        answers: Tokens of each answer, without the stop token.
        ends: Stop token of each answer; ``None`` if it ended otherwise.
        gold: Loss of the gold answer's tokens and their number, of each prompt with a gold answer, by its number.
    """

    answers: list[list[int]]
    ends: list[int | None]
    gold: dict[int, tuple[float, float]]


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
    if not parts.packed:
        losses = {} if gold is None else _gold_losses(parts, gold, prefill_tokens)
        made = generate_padded(parts, prompts, stops, max_new_tokens, ended, sampling)
        return Decoded([answer for answer, _ in made], [end for _, end in made], losses)
    prompt_of = list(range(len(prompts)) if prompt_of is None else prompt_of) * (
        1 if varied is None else varied.num_points
    )
    answers: list[list[int]] = [[] for _ in prompt_of]
    ends: list[int | None] = [None] * len(prompt_of)
    if not prompt_of:
        return Decoded(answers, ends, {})
    tokens: dict[int, int] = {}
    gold_losses: dict[int, tuple[float, float]] = {}
    check_places(parts)
    decoder = Decoder(parts, prompts, prompt_of, max_new_tokens, prefill_tokens, varied, kept)
    for rows, cached in decoder.chunks():
        logits, of_rows = decoder.prefill(rows, cached, gold)
        tokens |= logits.tokens(0, sampling)
        if of_rows is not None:
            gold_losses |= _by_prompt(rows, of_rows)
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
    return Decoded(answers, ends, gold_losses)


def _gold_losses(parts: ModelParts, gold: Sequence[EncodedExample], max_tokens: int) -> dict[int, tuple[float, float]]:
    found: dict[int, tuple[float, float]] = {}
    known = [number for number, example in enumerate(gold) if example.gold]
    for chunk in chunk_by_tokens([len(gold[number].sequences[0].ids) for number in known], max_tokens):
        rows = [known[place] for place in chunk]
        batch = pack([gold[row] for row in rows]).to(parts.model.device)
        found |= _by_prompt(rows, answer_losses(needed_logits(parts, batch), batch))
    return found


def _by_prompt(rows: Sequence[int], losses: RowLosses) -> dict[int, tuple[float, float]]:
    """Return loss and number of tokens of the rows that have a gold answer."""
    pairs = zip(losses.totals.tolist(), losses.weights.tolist(), strict=True)
    return {row: pair for row, pair in zip(rows, pairs, strict=True) if pair[1] > 0}
