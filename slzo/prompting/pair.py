"""Load a tuned model together with its untuned base model."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.checkpoints.find import RUNS, find_checkpoint
from slzo.data.chat import ChatEncoder
from slzo.data.encoding import Encoder
from slzo.export.delta import read_delta, swap
from slzo.export.exported import Exported, virtual_tokens_error
from slzo.export.restore import load_base, tokenizer_of
from slzo.models.load import load_model, load_tokenizer
from slzo.tasks.base import Example
from slzo.tasks.fields import check_characters
from slzo.tasks.messages import ChatFormat, Message
from slzo.utils.console import rank_zero_warn
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded
from slzo.utils.pluralize import pluralize

Use = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Function that returns a context in which the model can be used; only one context may be open at a time."""

_Loaded = tuple[PreTrainedTokenizerBase, Mapping[str, Use]]


@dataclass(frozen=True)
class Pair:
    """Two models with the same tokenizer.

    Attributes:
        tokenizer: The tokenizer.
        models: The models by name: "untuned", unless it was not requested, and "tuned", in this order.
        candidates: The answers that all rows of the task have; ``None`` if it has none.
        chat: Format of the conversations that it was tuned on; ``None`` for other texts.
        stop: Texts that end an answer besides the EOS token.
        prompt_length: Most tokens of a prompt, see :attr:`slzo.task_data.TaskData.prompt_length`; ``None`` for no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    models: Mapping[str, Use]
    candidates: tuple[str, ...] | None
    chat: ChatFormat | None
    stop: tuple[str, ...]
    prompt_length: int | None = None

    def tokens_of(self, prompt: Example, room: int | None = None) -> tuple[int, ...]:
        """Return the tokens of a prompt as ``slzo predict`` does: without spaces at its ends, and cut if it is too long.

        ``room`` is the most tokens that the model can take; ``None`` for no limit.

        For a model of conversations these are its messages in the chat template. Without messages, the text is the user's turn.

        Raises:
            SlzoError: The prompt is empty, or the template does not take it.
        """
        check_prompt(prompt)
        if self.chat is None:
            prompt = replace(prompt, prompt=prompt.prompt.strip(" "))
        else:
            turns = prompt.messages or (Message("user", prompt.prompt),)
            prompt = replace(prompt, messages=self.chat.with_system(turns))
        encoder = self._encoder
        by_model = room is not None and room < encoder.max_length
        if room is not None and by_model:
            encoder = encoder.limited_to(room, None, True)
        encoded = encoder.encode_prompt(prompt, max_new_tokens=0)
        if encoded.cut:
            leaves = "max_new_tokens leaves of the model's length" if by_model else "data.max_length of the run leaves"
            rank_zero_warn(
                f"the prompt is longer than the {encoder.max_length} tokens that {leaves} for prompts, and is cut as in slzo "
                "predict"
            )
        return encoded.ids

    @property
    def lead(self) -> tuple[int, ...]:
        """Tokens that the chat template writes before each answer."""
        return self._encoder.lead

    @cached_property
    def _encoder(self) -> Encoder:
        length = sys.maxsize if self.prompt_length is None else self.prompt_length
        if self.chat is None:
            return Encoder(self.tokenizer, length)
        return ChatEncoder(self.tokenizer, length, self.chat)


def check_prompt(prompt: Example) -> None:
    """Raise SlzoError if a prompt is empty, or has bytes that are not UTF-8."""
    if not prompt.prompt.strip():
        raise SlzoError(f"prompt {prompt.prompt!r}: is empty; give some text")
    try:
        check_characters(prompt.prompt)
    except ValueError:  # Python reads such bytes of a command line as halves of surrogate pairs
        raise SlzoError(f"prompt {prompt.prompt!r}: is not UTF-8; give it as UTF-8, or in a file") from None


def load_pair(path: str, *, base: str | None = None, untuned: bool = True, trust_remote_code: bool = False) -> Pair:
    """Load both models.

    Args:
        path: A run's folder, a checkpoint, an exported folder, or "last" or "best" for the newest run.
        base: The base model of an exported folder; ``None`` for the one that it names.
        untuned: Whether to load the base model too.
        trust_remote_code: Whether to run code from the model's repository.

    Raises:
        SlzoError: There is nothing usable at the path, or its base model is missing or a different one.
    """
    exported = Exported.at(path)
    if exported is not None:
        metadata = exported.facts
        tokenizer, models = _of_export(exported, base, untuned, trust_remote_code)
    elif base is not None:
        raise SlzoError(
            f"base {base!r}: {path!r} is not an exported folder, and a checkpoint names its own base; leave it out"
        )
    else:
        checkpoint = find_checkpoint(expanded(path), RUNS)
        metadata = checkpoint.metadata
        tokenizer, models = _of_checkpoint(checkpoint, trust_remote_code)
    if number := metadata.get("num_demonstrations"):
        rank_zero_warn(
            f"the run puts {pluralize(number, 'solved row')} before each prompt (data.num_demonstrations); here prompts have none"
        )
    found = metadata.get("candidates")
    return Pair(
        tokenizer,
        {name: use for name, use in models.items() if untuned or name == "tuned"},
        candidates=None if found is None else tuple(found),
        chat=ChatFormat(system=metadata.get("system_prompt")) if metadata.get("chat") else None,
        stop=tuple(metadata.get("stop") or ()),
        prompt_length=metadata.get("prompt_length"),
    )


def _of_checkpoint(checkpoint: Checkpoint, trust_remote_code: bool) -> _Loaded:
    tuned_model = load_base(checkpoint, trust_remote_code)
    if tuned_model.parts.virtual_tokens is not None:
        raise virtual_tokens_error(checkpoint.path)
    model, tensors = tuned_model.parts.model, tuned_model.tensors
    before = {name: tensor.live.detach().clone() for name, tensor in tensors.items()}
    tuned_model.tensors.load(checkpoint.content["state_dict"])
    # an adapter stays in the model: LoRA's matrices add 0 before training
    return tokenizer_of(checkpoint.metadata, trust_remote_code), _with_tensors(model, swap(model, before))


def _of_export(exported: Exported, base: str | None, untuned: bool, trust_remote_code: bool) -> _Loaded:
    if exported.is_whole:
        tokenizer, models = load_tokenizer(str(exported.folder), trust_remote_code), {}
        if untuned:
            models["untuned"] = _always(_base_of(exported, base, trust_remote_code)[1])
        models["tuned"] = _always(load_model(str(exported.folder), exported.dtype, trust_remote_code))
        return tokenizer, models
    name, model = _base_of(exported, base, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code, exported.facts.get("chat_template"))
    if exported.is_delta:
        return tokenizer, _with_tensors(model, read_delta(exported.folder))
    adapted = exported.adapted(model, "base")

    @contextmanager
    def plain() -> Iterator[PreTrainedModel]:
        with adapted.disable_adapter():
            yield adapted.get_base_model()

    return tokenizer, {"untuned": plain, "tuned": _always(adapted)}


def _base_of(exported: Exported, base: str | None, trust_remote_code: bool) -> tuple[str, PreTrainedModel]:
    """Return name and model of the base of an exported folder."""
    without = ", or --untuned false" if exported.is_whole else ""
    try:
        name = exported.base_name("base") if base is None else base
    except SlzoError as error:
        raise SlzoError(f"{error}{without}") from error
    try:
        model = load_model(name, exported.dtype, trust_remote_code)
    except SlzoError as error:
        if base is not None:
            raise
        raise SlzoError(f"{error}; or give the base model of {str(exported.folder)!r} with --base{without}") from error
    exported.check_base(model, "base")
    return name, model


def _with_tensors(model: PreTrainedModel, tuned: Mapping[str, Tensor]) -> dict[str, Use]:
    """Make both models from a model with untuned weights; the tuned ones are written into it while they are used."""

    @contextmanager
    def swapped() -> Iterator[PreTrainedModel]:
        before = swap(model, tuned)
        try:
            yield model
        finally:
            swap(model, before)

    return {"untuned": _always(model), "tuned": swapped}


def _always(model: PreTrainedModel) -> Use:
    return lambda: nullcontext(model)
