"""``slzo generate`` and ``slzo chat``: what tuning changed, to be seen in words."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, cast

import transformers
from jsonargparse import ArgumentParser

from slzo.cli_errors import one_line
from slzo.commands import COMMANDS
from slzo.errors import SlzoError
from slzo.prompting.pair import Pair, Source, Use, load_pair
from slzo.prompting.prompts import read_prompts
from slzo.prompting.stream import Decoding, write_continuation


def generate(
    ckpt_path: str,
    prompt: str | None = None,
    prompts: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    untuned: bool = True,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    r"""Continue prompts with the untuned and the tuned model, one below the other.

    Args:
        ckpt_path: A run's folder, a checkpoint, an exported folder (adapter, merged or delta), or last or best of the newest run
            in runs.
        prompt: The text to go on from.
        prompts: A file of them: one a line, or JSON Lines with the field prompt.
        max_new_tokens: Length of each text, in tokens.
        temperature: 0 takes the most likely token each time; above 0 draws.
        seed: Of the draws.
        untuned: Show the untuned model too.
        base: The base model of an exported folder, where the one that it names cannot be loaded.
        trust_remote_code: Run model code that comes with a Hub repository.
    """
    if (prompt is None) == (prompts is None):
        raise SlzoError("prompt: give one with --prompt, or a file of them with --prompts")
    texts = [prompt] if prompt is not None else read_prompts(str(prompts))
    decoding = Decoding(max_new_tokens, temperature, seed)
    pair = load_pair(Source(ckpt_path, base, untuned, trust_remote_code))
    for number, text in enumerate(texts):
        _write(f"{chr(10) if number else ''}{text}\n")
        ids = _tokens(pair, text)
        for name, use in _both(pair):
            _write(f"--- {name}\n")
            with use() as model:
                write_continuation(model, pair.tokenizer, ids, decoding, sys.stdout)


def chat(
    ckpt_path: str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    untuned: bool = True,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Talk to the untuned and the tuned model: each line is a message to both; /new begins anew, Ctrl-D ends.

    Args:
        ckpt_path: A run's folder, a checkpoint, an exported folder (adapter, merged or delta), or last or best of the newest run
            in runs.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the most likely token each time; above 0 draws.
        seed: Of the draws.
        untuned: Show the untuned model too.
        base: The base model of an exported folder, where the one that it names cannot be loaded.
        trust_remote_code: Run model code that comes with a Hub repository.
    """
    decoding = Decoding(max_new_tokens, temperature, seed)
    pair = load_pair(Source(ckpt_path, base, untuned, trust_remote_code))
    if pair.tokenizer.chat_template is None:
        raise SlzoError("chat: the model's tokenizer has no chat template, it is no chat model; use slzo generate")
    talks: dict[str, list[dict[str, str]]] = {}
    for message in _messages():
        if message == "/new":
            talks = {}
            continue
        for name, use in _both(pair):
            talk = [*talks.get(name, []), {"role": "user", "content": message}]
            ids = pair.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
            _write(f"--- {name}\n")
            try:
                with use() as model:
                    answer = write_continuation(model, pair.tokenizer, cast("list[int]", ids), decoding, sys.stdout)
            except SlzoError as error:
                _write(f"{error}, or begin anew with /new\n")
                continue
            talks[name] = [*talk, {"role": "assistant", "content": answer}]


_FUNCTIONS: Mapping[str, Callable[..., None]] = MappingProxyType({"generate": generate, "chat": chat})


class _Parser(ArgumentParser):
    """Reports a mistake in one line instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise SlzoError(one_line(message, self)) from ex


def parser_of(command: str) -> ArgumentParser:
    """The options of one of the commands."""
    parser = _Parser(prog=f"slzo {command}", description=COMMANDS[command].help)
    parser.add_argument("--config", action="config", help="Options in a YAML file.")
    parser.add_function_arguments(_FUNCTIONS[command], as_group=False, as_positional=False)
    return parser


def run(args: Sequence[str]) -> None:
    """Run ``generate`` or ``chat`` with its options.

    Raises:
        SlzoError: Something about the options or files is wrong.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, told to peft
    options: dict[str, Any] = parser_of(args[0]).parse_args(list(args[1:])).as_dict()
    options.pop("config", None)
    _FUNCTIONS[args[0]](**options)


def _both(pair: Pair) -> Iterator[tuple[str, Use]]:
    if pair.untuned is not None:
        yield "untuned", pair.untuned
    yield "tuned", pair.tuned


def _tokens(pair: Pair, text: str) -> list[int]:
    ids: list[int] = pair.tokenizer(text)["input_ids"]
    if not ids:
        raise SlzoError(f"prompt {text!r}: is empty; give some text")
    return ids


def _messages() -> Iterator[str]:
    """Lines from the terminal, or from a pipe."""
    while True:
        if sys.stdin.isatty():
            _write("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
