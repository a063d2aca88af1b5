"""What ends an answer, its text, and generation with transformers; :mod:`slzo.evaluation.decoding` has slzo's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slzo.data.encoding import newline_token
from slzo.evaluation.sampling import Sampling
from slzo.models.parts import ModelParts
from slzo.tasks.base import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ended = Callable[[Sequence[int]], bool]
"""Function that says whether an answer's tokens so far end it."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Where an answer ends: at EOS, before one of the texts of ``stop``, or after ``max_new_tokens`` tokens, >= 1.

    The EOS tokens are those of the tokenizer and of the model's generation config. The tokens of ``lead``, with which an answer
    may begin, are not part of its text, see :class:`slzo.data.encoding.Encoder`.
    """

    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = MAX_NEW_TOKENS
    lead: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer.

    Attributes:
        text: The text before the stop token or text, stripped.
        num_tokens: Number of generated tokens, without the stop token.
        tokens: All generated tokens, with the stop token.
    """

    text: str
    num_tokens: int
    tokens: tuple[int, ...] = ()


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, stop: Sequence[str] = ("\n",)) -> set[int]:
    """Return the tokens that end an answer: EOS, and each stop text that is a single token."""
    config = model.generation_config
    own = None if config is None else config.eos_token_id  # such as <end_of_turn>, besides the tokenizer's
    added = tokenizer.get_added_vocab()  # other tokens may be part of longer texts
    single = (newline_token(tokenizer) if text == "\n" else added.get(text) for text in stop)
    tokens = (tokenizer.eos_token_id, *single)
    return {token for token in tokens if token is not None}.union([own] if isinstance(own, int) else own or ())


def answer_text(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ("\n",), lead: tuple[int, ...] = ()
) -> str:
    """Decode generated tokens without a ``lead`` and return the text before the first stop text, stripped."""
    text = str(tokenizer.decode(list(_without_lead(ids, lead)), skip_special_tokens=True))
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))].strip()


def _without_lead(ids: Sequence[int], lead: tuple[int, ...]) -> Sequence[int]:
    return ids[len(lead) :] if tuple(ids[: len(lead)]) == lead else ids


def ends_with(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], lead: tuple[int, ...] = ()) -> Ended | None:
    """Return a function that says whether the last tokens after a ``lead`` contain a stop text.

    ``None`` if :func:`stop_tokens` has them all.
    """
    texts = [text for text in stop if text not in tokenizer.get_added_vocab()]  # added tokens are never part of others
    if not texts:
        return None
    longest = max(len(text.encode()) for text in texts) + 1

    def ended(ids: Sequence[int]) -> bool:
        if tuple(ids) == lead[: len(ids)]:
            return False
        ids = _without_lead(ids, lead)
        tail = str(tokenizer.decode(list(ids[-longest:]), skip_special_tokens=True))
        return any(text in tail for text in texts)

    return ended


def generate_plainly(
    model: PreTrainedModel, ids: Tensor, stops: set[int], ended: Ended | None, **options: Any
) -> Tensor:
    """Generate with transformers without the settings that come with the model, such as a repetition penalty.

    Args:
        model: The model.
        ids: Prompts, shape (rows, tokens), int64.
        stops: Tokens that end an answer; if there are none, the model's own EOS does.
        ended: Says whether an answer's tokens so far end it.
        options: Further arguments of ``model.generate``.

    Returns:
        Prompts and answers, shape (rows, tokens), int64.
    """
    from transformers import GenerationConfig  # loads packages that scoring candidates does not need

    def has_ended(so_far: Tensor, logits: Tensor, **kwargs: Any) -> Tensor:
        assert ended is not None
        return torch.tensor([ended(answer) for answer in so_far[:, ids.shape[1] :].tolist()], device=so_far.device)

    own: Any = model.generation_config
    # with EOS, because a PeftModel also leaves this one in its base model
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        output: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids,
            eos_token_id=sorted(stops) or None,
            pad_token_id=0,  # of finished rows
            stopping_criteria=None if ended is None else [has_ended],
            **options,
        )
        return output
    finally:
        model.generation_config = own


def generate_padded(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    stops: set[int],
    max_new_tokens: int,
    ended: Ended | None,
    sampling: Sampling | None,
) -> list[tuple[list[int], int | None]]:
    """Generate with transformers, padded on the left, for models whose attention cannot be replaced.

    Returns:
        Tokens of each answer without the stop token, and the stop token.
    """
    if not prompts:
        return []
    parts.check_padded()
    lengths = [len(prompt) for prompt in prompts]
    # the model would see padding: run equal lengths together
    if not parts.limits.left_padding and len(set(lengths)) > 1:
        answers: dict[int, tuple[list[int], int | None]] = {}
        for length in set(lengths):
            rows = [row for row, row_length in enumerate(lengths) if row_length == length]
            of_rows = None if sampling is None else sampling.of(rows)
            found = generate_padded(parts, [prompts[row] for row in rows], stops, max_new_tokens, ended, of_rows)
            answers.update(zip(rows, found, strict=True))
        return [answers[row] for row in range(len(prompts))]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=parts.model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)

    def add_noise(so_far: Tensor, logits: Tensor) -> Tensor:
        assert sampling is not None
        return sampling.with_noise(logits, range(len(prompts)), so_far.shape[1] - width)

    output = generate_plainly(
        parts.model,
        ids,
        stops,
        ended,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        logits_processor=None if sampling is None else [add_noise],
    )
    return [_until_end(new, stops, ended) for new in output[:, width:].tolist()]


def _until_end(new: Sequence[int], stops: set[int], ended: Ended | None) -> tuple[list[int], int | None]:
    """Return the tokens up to the end of the answer, without a stop token, and the stop token."""
    answer: list[int] = []
    for token in new:
        if token in stops:
            return answer, token
        answer.append(token)
        if ended is not None and ended(answer):
            break
    return answer, None
