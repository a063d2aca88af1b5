"""Generate texts and write them token by token."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from slzo.evaluation.generation import ends_with, generate_plainly, stop_tokens
from slzo.models.load import max_positions
from slzo.utils.errors import SlzoError


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
    max_new_tokens: int,
    write: Callable[[str], object],
    stop: Sequence[str],
) -> None:
    """Generate the most likely tokens with transformers up to EOS or a text of ``stop``; ``write`` their text meanwhile.

    Raises:
        SlzoError: Prompt and new tokens exceed the model's maximum length.
    """
    known = max_positions(model)
    if known is not None and len(ids) + max_new_tokens > known:
        raise SlzoError(
            f"the prompt has {len(ids)} tokens; with max_new_tokens {max_new_tokens} this exceeds the model's limit of "
            f"{known}; shorten the prompt or lower max_new_tokens"
        )
    stream, prompt = _Stream(tokenizer, write, stop), torch.tensor([list(ids)], device=model.device)
    ends = stop_tokens(tokenizer, model, stop)
    generate_plainly(
        model,
        prompt,
        ends,
        ends_with(tokenizer, stop),
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=stream,
    )
