"""Answers to many prompts at once, greedy or sampled.

Prompts are run packed, a common beginning once. Decoding then feeds one token per unfinished row; keys and values lie in
buffers of rows of similar length, so that little padding is attended to, and a finished row leaves the buffers at once: see
:mod:`slzo.evaluation.decoding`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slzo.batches.encoded import EncodedExample
from slzo.batches.losses import LossSum, add_up, answer_loss, no_loss
from slzo.batches.packing import pack
from slzo.batches.sharing import chunk_by_tokens
from slzo.data.encoding import newline_token
from slzo.evaluation.decoding import Kept, Wanted, decode
from slzo.evaluation.sampling import Sampling
from slzo.models.parts import ModelParts

MAX_NEW_TOKENS = 50
"""Longest answer, in tokens (MeZO)."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Where an answer ends.

    Attributes:
        stop: Texts that end it, beside the EOS token.
        max_new_tokens: Its most tokens, >= 1.
    """

    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer.

    Attributes:
        text: Without what ended it, stripped.
        num_tokens: Tokens that were generated for it, the one that ended it left out.
    """

    text: str
    num_tokens: int


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        answers: New tokens of each prompt, the stop token left out.
        gold: Summed loss of the gold answers' tokens, if they were asked for.
    """

    answers: list[list[int]]
    gold: LossSum | None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ("\n",)) -> set[int]:
    """The tokens that end an answer: EOS, and each of these texts that is one token of its own."""
    return {
        token for token in (tokenizer.eos_token_id, *(_token(tokenizer, text) for text in stop)) if token is not None
    }


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ("\n",)) -> str:
    """The answer in generated tokens: the text before the first of the texts that end one, stripped."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))].strip()


def _token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The one token that a text is wherever it stands, ``None`` if there is none."""
    return newline_token(tokenizer) if text == "\n" else tokenizer.get_added_vocab().get(text)


def ends_with(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Whether generated tokens end in a text that ends an answer and is more than one token; ``None`` if no text is."""
    texts = [text for text in stop if _token(tokenizer, text) is None]
    if not texts:
        return None
    longest = max(len(text.encode()) for text in texts) + 1

    def ended(ids: Sequence[int]) -> bool:
        tail = str(tokenizer.decode(list(ids[-longest:]), skip_special_tokens=True))
        return any(text in tail for text in texts)

    return ended


@torch.no_grad()
def generate(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    prefill_tokens: int = 1024,
    gold: Sequence[EncodedExample] | None = None,
    ended: Callable[[Sequence[int]], bool] | None = None,
    sampling: Sampling | None = None,
    kept: Kept | None = None,
) -> Generation:
    """Continuations of prompts.

    Args:
        parts: The model with its live weights.
        prompts: Token ids, at least one each.
        stops: Tokens that end an answer, see :func:`stop_tokens`.
        max_new_tokens: Longest answer, >= 1.
        prefill_tokens: Prompt tokens per forward pass.
        gold: Gold answers after their prompts, one example per prompt; their loss is taken in the same passes.
        ended: Whether an answer's tokens so far end it, see :func:`ends_with`; a model that pads does not ask.
        sampling: Draws the tokens, one key per prompt; ``None``: the likeliest are taken.
        kept: States of the prompts that are kept from earlier.
    """
    if not parts.packed or parts.compile:
        loss = None if gold is None else _separate_loss(parts, gold, prefill_tokens)
        return Generation(_generate_padded(parts, prompts, stops, max_new_tokens, sampling), loss)
    answers, loss = decode(
        parts,
        prompts,
        [Wanted(prompt) for prompt in range(len(prompts))],
        stops,
        max_new_tokens=max_new_tokens,
        prefill_tokens=prefill_tokens,
        ended=ended,
        sampling=sampling,
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
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    max_new_tokens: int,
    sampling: Sampling | None,
) -> list[list[int]]:
    """For models whose attention cannot be exchanged: transformers' own generation, padded on the left."""
    if not prompts:
        return []
    lengths = [len(prompt) for prompt in prompts]
    if not parts.pads_left and len(set(lengths)) > 1:  # padding would be seen: equal lengths together
        answers: dict[int, list[int]] = {}
        for length in set(lengths):
            rows = [row for row, own in enumerate(lengths) if own == length]
            own_sampling = None if sampling is None else sampling.of(rows)
            found = _generate_padded(parts, [prompts[row] for row in rows], stops, max_new_tokens, own_sampling)
            answers.update(zip(rows, found, strict=True))
        return [answers[row] for row in range(len(prompts))]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=parts.model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)

    def _disturb(so_far: Tensor, logits: Tensor) -> Tensor:
        assert sampling is not None
        return sampling.disturbed(logits, range(len(prompts)), so_far.shape[1] - width)

    output = parts.model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=0,
        logits_processor=None if sampling is None else [_disturb],
    )
    return [list(takewhile(lambda token: token not in stops, new)) for new in output[:, width:].tolist()]
