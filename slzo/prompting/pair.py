"""Load a tuned model together with its untuned base model."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.checkpoints.find import RUNS, find_checkpoint
from slzo.data.chat import ChatEncoder
from slzo.data.encoding import Encoder
from slzo.export import FACTS_FILE
from slzo.export.adapter import ADAPTER_CONFIG_FILE
from slzo.export.delta import DELTA_FILE, read_delta, swap
from slzo.export.restore import tokenizer_of, untuned
from slzo.models.adapters.base import import_peft
from slzo.models.engine import DType
from slzo.models.fingerprint import Fingerprint
from slzo.models.load import load_model, load_tokenizer
from slzo.models.origin import loadable
from slzo.tasks.base import Example
from slzo.tasks.messages import ChatFormat, Message
from slzo.utils.errors import SlzoError, one_line
from slzo.utils.files import read_json

_EXPORT_AGAIN = "export it again"

Use = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Function that returns a context in which the model can be used; only one context may be open at a time."""


@dataclass(frozen=True)
class Pair:
    """Two models with the same tokenizer.

    Attributes:
        tokenizer: The tokenizer.
        models: The models by name: "untuned", unless it was not requested, and "tuned", in this order.
        candidates: The answers that all rows of the task have; ``None`` if it has none.
        chat: Format of the conversations that it was tuned on; ``None`` for other texts.
        stop: Texts that end an answer besides the EOS token.
    """

    tokenizer: PreTrainedTokenizerBase
    models: Mapping[str, Use]
    candidates: tuple[str, ...] | None = None
    chat: ChatFormat | None = None
    stop: tuple[str, ...] = ()

    def tokens_of(self, prompt: Example) -> tuple[int, ...]:
        """Return the tokens of a prompt as in training, but never cut.

        For a model of conversations these are its messages in the chat template. Without messages, the text is the user's turn.

        Raises:
            SlzoError: The prompt is empty, or the template does not take it.
        """
        if not prompt.prompt.strip():
            raise SlzoError(f"prompt {prompt.prompt!r}: is empty; give some text")
        if self.chat is not None and not prompt.messages:
            prompt = replace(prompt, messages=self.chat.with_system((Message("user", prompt.prompt),)))
        return self._encoder.encode_prompt(prompt, max_new_tokens=0)

    @cached_property
    def _encoder(self) -> Encoder:
        if self.chat is None:
            return Encoder(self.tokenizer, sys.maxsize)
        return ChatEncoder(self.tokenizer, sys.maxsize, self.chat)


@dataclass(frozen=True)
class Source:
    """Where to load a pair from.

    Attributes:
        path: A run's folder, a checkpoint, an exported folder, or "last" or "best" for the newest run.
        base: The base model of an exported folder; ``None`` for the one that it names.
        untuned: Whether to load the base model too.
        trust_remote_code: Whether to run code from the model's repository.
        dtype: Type of the weights of an exported folder; ``None`` for the one that it names.
    """

    path: str
    base: str | None = None
    untuned: bool = True
    trust_remote_code: bool = False
    dtype: DType | None = None


def load_pair(source: Source) -> Pair:
    """Load both models.

    Raises:
        SlzoError: There is nothing usable at the path, or its base model is missing or a different one.
    """
    path = Path(source.path).expanduser()
    if is_export(path):
        note: Mapping[str, Any] = read_json(path / FACTS_FILE, _EXPORT_AGAIN)
        pair = _from_export(path, note, source)
    elif source.base is not None:
        raise SlzoError(
            f"base {source.base!r}: {source.path!r} is not an exported folder, and a checkpoint names its own base; leave it out"
        )
    else:
        checkpoint = find_checkpoint(path, RUNS)
        note, pair = checkpoint.note, _from_checkpoint(checkpoint, source)
    found = note.get("candidates")
    return replace(
        pair,
        models={name: use for name, use in pair.models.items() if source.untuned or name == "tuned"},
        candidates=None if found is None else tuple(found),
        chat=ChatFormat(system=note.get("system_prompt")) if note.get("chat") else None,
        stop=tuple(note.get("stop") or ()),
    )


def _from_checkpoint(checkpoint: Checkpoint, source: Source) -> Pair:
    tuned_model, note = untuned(checkpoint, source.trust_remote_code), checkpoint.note
    if tuned_model.parts.virtual_tokens is not None:
        raise _virtual_tokens_error(source)
    tokenizer = tokenizer_of(note, source.trust_remote_code)
    model, tensors = tuned_model.parts.model, tuned_model.tensors
    before = {name: tensor.live.detach().clone() for name, tensor in tensors.items()}
    tuned_model.tensors.load(checkpoint.content["state_dict"])
    # an adapter stays in the model: LoRA's matrices add 0 before training
    return _with_tensors(model, swap(model, before), tokenizer)


def is_export(path: str | Path) -> bool:
    """Return whether a path is an exported folder."""
    return any((Path(path).expanduser() / name).is_file() for name in (FACTS_FILE, ADAPTER_CONFIG_FILE))


def exported_options(folder: str | Path, model: str | None) -> dict[str, str]:
    """Return the options that score an exported folder: model, dtype, and the task if it is a built-in one.

    ``model`` is the base model that the user gave; ``None`` for the one that the folder names.

    Raises:
        SlzoError: The base model is a local folder, and none is given.
    """
    path = Path(folder).expanduser()
    facts = read_json(path / FACTS_FILE, _EXPORT_AGAIN)
    if model is None:
        is_whole = (path / "config.json").is_file()
        model = str(path) if is_whole else _base_name(path, facts, "model.model")
    options = {"model.model": model, "model.dtype": facts.get("dtype"), "data.task": facts.get("task")}
    return {name: value for name, value in options.items() if value is not None}


def load_exported(source: Source) -> PreTrainedModel:
    """Load the tuned model of an exported folder; an adapter is merged into it.

    Raises:
        SlzoError: The folder or its base model cannot be used, or it is another base model.
    """
    folder = Path(source.path).expanduser()
    facts = read_json(folder / FACTS_FILE, _EXPORT_AGAIN)
    if (folder / "config.json").is_file():
        return _load(str(folder), facts, source)
    model = _base(source.base or _base_name(folder, facts), facts, source)
    if (folder / DELTA_FILE).is_file():
        swap(model, read_delta(folder))
        return model
    merged: PreTrainedModel = _adapted(model, folder, source).merge_and_unload()
    return merged


def _from_export(folder: Path, facts: Mapping[str, Any], source: Source) -> Pair:
    if (folder / "config.json").is_file():
        tokenizer, models = load_tokenizer(str(folder), source.trust_remote_code), {}
        if source.untuned:
            models["untuned"] = _always(_base(source.base or _base_name(folder, facts), facts, source))
        models["tuned"] = _always(_load(str(folder), facts, source))
        return Pair(tokenizer, models)
    name = source.base or _base_name(folder, facts)
    model = _base(name, facts, source)
    tokenizer = load_tokenizer(name, source.trust_remote_code, facts.get("chat_template"))
    if (folder / DELTA_FILE).is_file():
        return _with_tensors(model, read_delta(folder), tokenizer)
    adapted = _adapted(model, folder, source)

    @contextmanager
    def plain() -> Iterator[PreTrainedModel]:
        with adapted.disable_adapter():
            yield adapted.get_base_model()

    return Pair(tokenizer, {"untuned": plain, "tuned": _always(adapted)})


def _base_name(folder: Path, facts: Mapping[str, Any], option: str = "base") -> str:
    base = facts.get("base_model", {})
    name = base.get("name") or read_json(folder / ADAPTER_CONFIG_FILE, _EXPORT_AGAIN).get("base_model_name_or_path")
    if not name or base.get("public") is False:  # a local folder on the machine where it was tuned
        which = f" (a local folder called {name!r} when it was tuned)" if name else ""
        raise SlzoError(f"ckpt_path {str(folder)!r}: its base model is not public{which}; give a copy with --{option}")
    return loadable(str(name)) if base.get("commit") is None else f"{name}@{base['commit']}"


def _base(name: str, facts: Mapping[str, Any], source: Source) -> PreTrainedModel:
    """Load the base model of an exported folder, and check that it is the original one."""
    try:
        model = _load(name, facts, source)
    except SlzoError as error:
        if source.base is not None:
            raise
        raise SlzoError(f"{error}; or give the base model of {source.path!r} with --base") from error
    Fingerprint.of(model).check(facts.get("fingerprint", {}))
    return model


def _load(name: str, facts: Mapping[str, Any], source: Source) -> PreTrainedModel:
    return load_model(name, source.dtype or facts.get("dtype", "float32"), source.trust_remote_code)


def _with_tensors(model: PreTrainedModel, tuned: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Make a pair from a model with untuned weights; the tuned ones are written into it while they are used."""

    @contextmanager
    def swapped() -> Iterator[PreTrainedModel]:
        before = swap(model, tuned)
        try:
            yield model
        finally:
            swap(model, before)

    return Pair(tokenizer, {"untuned": _always(model), "tuned": swapped})


def _adapted(model: PreTrainedModel, folder: Path, source: Source) -> Any:
    """Return the ``PeftModel`` of an adapter."""
    peft = import_peft(f"ckpt_path {source.path!r}")
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = one_line(error)
        raise SlzoError(
            f"ckpt_path {source.path!r}: the adapter does not fit its base model ({reason}); give the right one with --base"
        ) from error
    if adapted.active_peft_config.is_prompt_learning:
        raise _virtual_tokens_error(source)
    return adapted


def _virtual_tokens_error(source: Source) -> SlzoError:
    # transformers 5.24 ignores peft 0.21's virtual tokens
    return SlzoError(
        f"ckpt_path {source.path!r}: transformers cannot use the virtual tokens of prefix tuning; use slzo predict with the "
        "checkpoint of the run"
    )


def _always(model: PreTrainedModel) -> Use:
    return lambda: nullcontext(model)
