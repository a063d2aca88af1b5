"""Generate texts and write them token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from slzo.models.load import max_positions
from slzo.utils.errors import SlzoError


@dataclass(frozen=True)
class TextOptions:
    """Options of the generation.

    Attributes:
        max_new_tokens: Largest number of new tokens, >= 1.
        temperature: 0 takes the most likely token; larger values sample from the model's distribution.
        seed: Seed of the samples, the same for both models.
    """

    max_new_tokens: int
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        """Validate the options.

        Raises:
            SlzoError: An option is out of range.
        """
        if self.max_new_tokens < 1:
            raise SlzoError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise SlzoError(f"temperature {self.temperature}: must be 0 (the most likely token) or more")


class _Stream(TextStreamer):
    """Writes complete words to a given stream as soon as they are generated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of text."""
        self._out.write(text + ("\n" if stream_end else ""))
        self._out.flush()


@torch.no_grad()
def write_continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], options: TextOptions, out: TextIO
) -> None:
    """Generate a continuation with transformers and write it to ``out`` meanwhile.

    Raises:
        SlzoError: Prompt and new tokens exceed the model's maximum length.
    """
    known = max_positions(model)
    if known is not None and len(ids) + options.max_new_tokens > known:
        raise SlzoError(
            f"the prompt has {len(ids)} tokens; with max_new_tokens {options.max_new_tokens} this exceeds the model's limit of "
            f"{known}; shorten the prompt or lower max_new_tokens"
        )
    stream, prompt = _Stream(tokenizer, out), torch.tensor([list(ids)], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": 1.0, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=0 if pad is None else pad,
            streamer=stream,
            **sampling,
        )
