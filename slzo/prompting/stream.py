"""Generate texts and write them token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from slzo.evaluation.generation import ends_with, generate_plainly, stop_tokens
from slzo.models.load import max_positions
from slzo.utils.errors import SlzoError, check_at_least

_LEAST_TEMPERATURE = 1e-3  # with less, logits over it overflow
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class TextOptions:
    """Options of the generation.

    Attributes:
        max_new_tokens: Largest number of new tokens, >= 1.
        temperature: 0 takes the most likely token; larger values sample from the model's distribution.
        seed: Seed of the samples, the same for both models.

    Raises:
        SlzoError: An option is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("max_new_tokens", self.max_new_tokens)
        if self.temperature != 0 and not _LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise SlzoError(
                f"temperature {self.temperature}: must be 0 (the most likely token), or at least {_LEAST_TEMPERATURE}"
            )
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise SlzoError(f"seed {self.seed}: give a number from 0 to {_LARGEST_SEED}")


class _Stream(TextStreamer):
    """Writes complete words as soon as they are generated, up to the first stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object], stop: Sequence[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self._stop = write, stop
        self._text, self._written = "", 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of text, except what may be the beginning of a stop text."""
        self._text += text
        found = min((self._text.find(stop) for stop in self._stop if stop in self._text), default=len(self._text))
        begun = 0 if stream_end else max((len(stop) - 1 for stop in self._stop), default=0)
        end = max(self._written, min(found, len(self._text) - begun))
        self._write(self._text[self._written : end] + ("\n" if stream_end else ""))
        self._written = end


@torch.no_grad()
def write_continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    options: TextOptions,
    write: Callable[[str], object],
    stop: Sequence[str],
) -> None:
    """Generate a continuation with transformers up to EOS or a text of ``stop``; ``write`` its parts meanwhile.

    Raises:
        SlzoError: Prompt and new tokens exceed the model's maximum length.
    """
    known = max_positions(model)
    if known is not None and len(ids) + options.max_new_tokens > known:
        raise SlzoError(
            f"the prompt has {len(ids)} tokens; with max_new_tokens {options.max_new_tokens} this exceeds the model's limit of "
            f"{known}; shorten the prompt or lower max_new_tokens"
        )
    stream, prompt = _Stream(tokenizer, write, stop), torch.tensor([list(ids)], device=model.device)
    ends = stop_tokens(tokenizer, model, stop)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": 1.0, "top_k": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        generate_plainly(
            model,
            prompt,
            ends,
            ends_with(tokenizer, stop),
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=options.max_new_tokens,
            streamer=stream,
            **sampling,
        )
