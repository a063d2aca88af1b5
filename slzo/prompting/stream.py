"""Generate texts and write them token by token."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from slzo.evaluation.generation import ends_with, generate_plainly, stop_tokens
from slzo.models.load import max_positions
from slzo.utils.errors import SlzoError


class _Stream(TextStreamer):
    """Writes complete words as soon as they are generated, without ``lead``, up to the first stop text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object], stop: Sequence[str], lead: str
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self._stop, self._lead = write, stop, lead
        self._text, self._written = "", 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of text, except what may be the beginning of the lead or of a stop text."""
        self._text += text
        if self._lead.startswith(self._text) and not stream_end:
            return
        self._text, self._lead = self._text.removeprefix(self._lead), ""
        found = min((self._text.find(stop) for stop in self._stop if stop in self._text), default=len(self._text))
        begun = 0 if stream_end else max((len(stop) - 1 for stop in self._stop), default=0)
        end = max(self._written, min(found, len(self._text) - begun))
        self._write(self._text[self._written : end] + ("\n" if stream_end else ""))
        self._written = end


def room_for_prompt(model: PreTrainedModel, max_new_tokens: int) -> int | None:
    """Return the most tokens of a prompt that the model can continue; ``None`` if there is no limit.

    Raises:
        SlzoError: There is no room for a prompt.
    """
    known = max_positions(model)
    if known is not None and max_new_tokens >= known:
        raise SlzoError(
            f"max_new_tokens {max_new_tokens}: leaves no room for a prompt, as the model takes {known} tokens; lower it"
        )
    return None if known is None else known - max_new_tokens


@torch.no_grad()
def write_continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    max_new_tokens: int,
    write: Callable[[str], object],
    stop: Sequence[str],
    lead: tuple[int, ...] = (),
) -> None:
    """Generate the most likely tokens with transformers up to EOS or a text of ``stop``; ``write`` their text meanwhile.

    The tokens of ``lead``, with which an answer may begin, are not written, see :class:`slzo.evaluation.generation.Decoding`.
    """
    stream = _Stream(tokenizer, write, stop, str(tokenizer.decode(list(lead), skip_special_tokens=True)))
    prompt = torch.tensor([list(ids)], device=model.device)
    ends = stop_tokens(tokenizer, model, stop)
    generate_plainly(
        model,
        prompt,
        ends,
        ends_with(tokenizer, stop, lead),
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=stream,
    )
