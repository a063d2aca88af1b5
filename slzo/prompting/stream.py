"""Texts as they are generated, token by token."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from slzo.utils.errors import SlzoError


@dataclass(frozen=True)
class Decoding:
    """How a text goes on.

    Attributes:
        max_new_tokens: At most so many tokens, >= 1.
        temperature: 0 takes the most likely token each time; above 0 draws from the model's distribution.
        seed: Of the draws: both models see the same.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            SlzoError: With the option.
        """
        if self.max_new_tokens < 1:
            raise SlzoError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise SlzoError(f"temperature {self.temperature}: must be 0 (the most likely token) or above")


class _Stream(TextStreamer):
    """Writes words as soon as they are whole, to a stream of one's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = out
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece."""
        self.text += text
        self._out.write(text + ("\n" if stream_end else ""))
        self._out.flush()


@torch.no_grad()
def write_continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], decoding: Decoding, out: TextIO
) -> str:
    """Generate, write to ``out`` on the way, and return the new text.

    Raises:
        SlzoError: The prompt and the new tokens are more than the model takes.
    """
    known = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(known, int) and len(ids) + decoding.max_new_tokens > known:
        raise SlzoError(
            f"the prompt has {len(ids)} tokens; with max_new_tokens {decoding.max_new_tokens} that is more than the {known} that "
            "the model takes; shorten one of them"
        )
    if _has_virtual_tokens(model):  # transformers 5.24 ignores the virtual tokens of peft 0.21 where it generates
        raise SlzoError("prefix tuning: transformers cannot generate with its virtual tokens; use slzo predict")
    stream, prompt = _Stream(tokenizer, out), torch.tensor([list(ids)], device=model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(decoding.seed)
        _generate(model, tokenizer, prompt, decoding, stream)
    return stream.text


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, decoding: Decoding, stream: _Stream
) -> None:
    """As transformers generates."""
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if decoding.temperature > 0:
        how = {"do_sample": True, "temperature": decoding.temperature, "top_p": 1.0, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.generate(  # type: ignore[operator]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=decoding.max_new_tokens,
        pad_token_id=0 if pad is None else pad,
        streamer=stream,
        **how,
    )


def _has_virtual_tokens(model: PreTrainedModel) -> bool:
    """Whether an adapter of peft puts virtual tokens before each sequence."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def write_text(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
