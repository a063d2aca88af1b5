"""Greedy answers to many prompts at once.

Prompts are run packed, a common beginning once. Decoding then feeds one token per unfinished row; keys and values lie in
buffers of rows of similar length, so that little padding is attended to, and a finished row leaves the buffers at once: see
:mod:`slzo.evaluation.decoding`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from transformers import PreTrainedTokenizerBase

from slzo.batches.encoded import EncodedExample
from slzo.batches.losses import LossSum, add_up, answer_loss, no_loss
from slzo.batches.packing import pack
from slzo.batches.sharing import chunk_by_tokens
from slzo.data.encoding import newline_token
from slzo.evaluation.decoding import Kept, Wanted, decode
from slzo.models.parts import ModelParts

MAX_NEW_TOKENS = 50
"""Longest answer, in tokens (MeZO)."""


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        answers: New tokens of each prompt, the stop token left out.
        gold: Summed loss of the gold answers' tokens, if they were asked for.
    """

    answers: list[list[int]]
    gold: LossSum | None


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: EOS and the newline."""
    return {token for token in (tokenizer.eos_token_id, newline_token(tokenizer)) if token is not None}


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The answer in generated tokens: the text before the first newline, stripped."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return text.split("\n", 1)[0].strip()


@torch.no_grad()
def generate(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    prefill_tokens: int = 1024,
    gold: Sequence[EncodedExample] | None = None,
    kept: Kept | None = None,
) -> Generation:
    """Greedy continuations.

    Args:
        parts: The model with its live weights.
        prompts: Token ids, at least one each.
        stops: Tokens that end an answer, see :func:`stop_tokens`.
        max_new_tokens: Longest answer, >= 1.
        prefill_tokens: Prompt tokens per forward pass.
        gold: Gold answers after their prompts, one example per prompt; their loss is taken in the same passes.
        kept: States of the prompts that are kept from earlier.
    """
    if not parts.packed or parts.compile:
        loss = None if gold is None else _separate_loss(parts, gold, prefill_tokens)
        return Generation(_generate_padded(parts, prompts, stops, max_new_tokens), loss)
    wanted = [Wanted(prompt) for prompt in range(len(prompts))]
    answers, loss = decode(
        parts,
        prompts,
        wanted,
        stops,
        max_new_tokens=max_new_tokens,
        prefill_tokens=prefill_tokens,
        kept=kept,
        gold=gold,
    )
    return Generation(answers, loss)


def _separate_loss(parts: ModelParts, gold: Sequence[EncodedExample], max_tokens: int) -> LossSum:
    losses = []
    known = [example for example in gold if example.gold]
    for chunk in chunk_by_tokens([example.sequences[0].ids for example in known], max_tokens, share=False):
        batch = pack([known[number] for number in chunk]).to(parts.model.device)
        losses.append(answer_loss(parts.logits(batch), batch))
    return add_up(losses) if losses else no_loss(parts.model.device)


def _generate_padded(
    parts: ModelParts, prompts: Sequence[Sequence[int]], stops: set[int], max_new_tokens: int
) -> list[list[int]]:
    """For models whose attention cannot be exchanged: transformers' own generation, padded on the left."""
    if not prompts:
        return []
    lengths = [len(prompt) for prompt in prompts]
    if not parts.pads_left and len(set(lengths)) > 1:  # padding would be seen: equal lengths together
        answers: dict[int, list[int]] = {}
        for length in set(lengths):
            rows = [row for row, own in enumerate(lengths) if own == length]
            found = _generate_padded(parts, [prompts[row] for row in rows], stops, max_new_tokens)
            answers.update(zip(rows, found, strict=True))
        return [answers[row] for row in range(len(prompts))]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=parts.model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)
    output = parts.model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=0,
    )
    return [list(takewhile(lambda token: token not in stops, new)) for new in output[:, width:].tolist()]
