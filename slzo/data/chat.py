"""Tokenization of conversations: chat templates, the tokens to train on, and the truncation of long conversations."""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from slzo.batches.encoded import EncodedExample, EncodedPrompt, EncodedSequence
from slzo.data.encoding import Encoder
from slzo.tasks.base import MAX_NEW_TOKENS, Example
from slzo.tasks.messages import ChatFormat, Message
from slzo.utils.errors import RowError, SlzoError, one_line
from slzo.utils.files import expanded

DEFAULT_TEMPLATE = "plain"
TEMPLATES: Mapping[str, str] = {
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}"
        "{{ (eos_token or '') if message['role'] == 'assistant' else '' }}{{ '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
"""Templates by name, for tokenizers without one: ``plain`` puts the role before each message."""

# With today's date rows would have other tokens each day, and a resume would be refused. Llama 3 has this date without a clock.
_DATE = date(2024, 7, 26)
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def find_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> tuple[str, str | None]:
    """Return the text of a template, and a sentence for the log if it is not the tokenizer's template.

    Raises:
        SlzoError: The name is neither a known template nor a readable file.
    """
    if name is None:
        try:
            return tokenizer.get_chat_template(), None
        except ValueError:
            return TEMPLATES[DEFAULT_TEMPLATE], (
                f"The tokenizer has no chat template: using the one called {DEFAULT_TEMPLATE} (data.task.template can be "
                f"{', '.join(TEMPLATES)}, or a file)."
            )
    if name in TEMPLATES:
        return TEMPLATES[name], f"Using the chat template called {name}."
    try:
        return expanded(name).read_text(encoding="utf-8"), f"Using the chat template in {name}."
    except (OSError, UnicodeDecodeError):
        raise SlzoError(
            f"data.task.template {name!r}: neither a known template nor a readable file; choose one of {', '.join(TEMPLATES)}, "
            "give a file with a Jinja template, or leave it out"
        ) from None


@dataclass(frozen=True, slots=True)
class _Turn:
    message: Message
    scored: bool  # whether it is trained on if it is the assistant's


class ChatEncoder(Encoder):
    """Encodes conversations with a chat template.

    The prompt is the templated text up to the assistant's answer. The answer is the text from there to the end of the turn.
    The prompt has the tokens that it has in generation, and the answer those that follow them.

    Args:
        tokenizer: The model's tokenizer.
        max_length: Longest sequence, in tokens.
        chat: Template and turns to train on.
    """

    shortening = "without the earliest turns, or without the start of the last one"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, chat: ChatFormat) -> None:
        super().__init__(tokenizer, max_length)
        self.chat = chat
        template, self.note = find_template(tokenizer, chat.template)
        self.template = template
        self._undated = _CLOCK.sub(lambda call: repr(_DATE.strftime(call[2])), template)
        # many SentencePiece tokenizers put a space before a text
        self._adds_space = self._ids("\na")[len(self._ids("\n")) :] != self._ids("a")
        self.lead, self._end = self._around_answer()
        self.stop = (self._end,) if self._end else ()

    def encode(
        self, example: Example, index: int, demonstrations: Sequence[Example] = (), only_gold: bool = False
    ) -> EncodedExample:
        ids, counts, cut = self._fit(example, self._solved(demonstrations), _answer(example), self.max_length)
        if True not in counts:
            raise RowError(f"{example.location}: the chat template leaves nothing of the answer; change either")
        first = counts.index(True)
        mask = tuple(counts[first:])
        sequence = EncodedSequence(tuple(ids), len(mask), None if all(mask) else mask)
        return EncodedExample(index, (sequence,), example.gold, cut)

    def encode_prompt(
        self, example: Example, demonstrations: Sequence[Example] = (), max_new_tokens: int = MAX_NEW_TOKENS
    ) -> EncodedPrompt:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise SlzoError(
                f"data.max_length {self.max_length}: leaves no room for a prompt with {max_new_tokens} new tokens; "
                f"{self.length_advice}, or lower data.task.max_new_tokens"
            )
        ids, _, cut = self._fit(example, self._solved(demonstrations), None, room)
        return EncodedPrompt(tuple(ids), cut)

    def _solved(self, demonstrations: Sequence[Example]) -> list[_Turn]:
        """Return the turns of demonstrations, without their system prompts."""
        solved: list[Message] = []
        for shown in demonstrations:
            solved += [turn for turn in shown.messages if not turn.is_system]
            solved.append(Message("assistant", _answer(shown)))
        return [_Turn(message, scored=False) for message in solved]

    def _fit(
        self, example: Example, shown: Sequence[_Turn], answer: str | None, room: int
    ) -> tuple[list[int], list[bool], bool]:
        """Return the tokens of the longest version of a conversation that fits, which are trained on, and whether it was cut.

        The turns of ``shown`` come after the system prompt. Without an answer, the tokens are those of the prompt alone.
        """
        own = [_Turn(message, scored=self.chat.turns == "all") for message in example.messages]
        front = sum(turn.message.is_system for turn in own[:1])
        try:
            ids, counts, cut = self._longest((*own[:front], *shown, *own[front:]), answer, room)
        except ValueError as error:  # of the template
            raise RowError(f"{example.location}: {error}; give rows that it supports, or another template") from error
        if len(ids) > room:
            subject = "the template" if answer is None else "the answer with the template"
            raise RowError(
                f"data.max_length {self.max_length}: {subject} of {example.location} alone needs {len(ids)} tokens, and "
                f"{room} are available; {self.length_advice}, or leave out the example"
            )
        return ids, counts, cut

    def _longest(self, turns: tuple[_Turn, ...], answer: str | None, room: int) -> tuple[list[int], list[bool], bool]:
        """Return the longest version that fits, or the shortest one if none does, and whether it is not the whole one."""
        ids, counts = self._tokens(turns, answer)
        if len(ids) <= room:
            return ids, counts, False
        versions = _shorter_versions(turns)
        place = bisect_left(versions, True, key=lambda each: len(self._tokens(each, answer)[0]) <= room)
        if place < len(versions):
            return (*self._tokens(versions[place], answer), True)
        # the last turn alone is too long: keep as much of its end as fits
        *others, last = versions[-1]
        text = last.message.content

        def end(kept: int) -> tuple[list[int], list[bool]]:
            message = Message(last.message.role, text[len(text) - kept :])
            return self._tokens((*others, _Turn(message, scored=False)), answer)

        first_too_long = 1 + bisect_left(range(1, len(text) + 1), True, key=lambda kept: len(end(kept)[0]) > room)
        return (*end(max(1, first_too_long - 1)), True)  # without any of it there would be no prompt

    def _tokens(self, conversation: tuple[_Turn, ...], answer: str | None) -> tuple[list[int], list[bool]]:
        """Return the tokens of a conversation and which of them are trained on; without an answer, the tokens of the prompt."""
        turns = [turn.message for turn in conversation]
        prompt = self._render(turns, True)
        if answer is None:
            return self._ids(prompt), []
        full = self._strip_tail(self._render((*turns, Message("assistant", answer)), False))
        spans = [(len(prompt), len(full))]
        starts = [prompt]
        for number, turn in enumerate(conversation):
            if turn.scored and turn.message.role == "assistant" and number:
                before = self._render(turns[:number], True)
                after = self._strip_tail(self._render(turns[: number + 1], False))
                starts += [before, after]
                spans.append((len(before), len(after)))
        if not all(full.startswith(start) for start in starts):
            first = (Message("user", "a"),)
            whole = self._render((*first, Message("assistant", "b")), False)
            keeps_turn, keeps_prompt = (whole.startswith(self._render(first, generate)) for generate in (False, True))
            if keeps_turn and not keeps_prompt:
                raise SlzoError(
                    "data.task.template: in this template an answer does not begin with the generation prompt, so its tokens "
                    f"cannot be found; use data.task.template {', '.join(TEMPLATES)}"
                )
            advice = "" if self.chat.turns == "last" else "data.task.turns last, or "
            raise SlzoError(
                "data.task.template: this template changes earlier turns when others follow, so the tokens of an answer "
                f"cannot be found; use {advice}data.task.template {', '.join(TEMPLATES)}"
            )
        bounds = sorted({0, *(bound for span in spans for bound in span)})
        trained = {start for start, _ in spans}
        ids: list[int] = []
        counts: list[bool] = []
        before = ""
        for start, stop in pairwise(bounds):
            tokens = self._ids_after(before, full[start:stop])
            before = full[start:stop]
            ids += tokens
            counts += [start in trained] * len(tokens)
        return ids, counts

    def _render(self, turns: Sequence[Message], generate: bool) -> str:
        messages = [asdict(turn) for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, chat_template=self._undated
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(turn.role for turn in turns)
            raise ValueError(
                f"the chat template cannot format a conversation of {roles} ({one_line(error, None)})"
            ) from error
        return str(text)

    def _strip_tail(self, text: str) -> str:
        """Remove white space after the end of the last turn, which is not part of the answer."""
        return text.rstrip() if self._end and text.rstrip().endswith(self._end) else text

    def _around_answer(self) -> tuple[tuple[int, ...], str]:
        """Return the tokens that the template writes before an answer, and the text of the end of its turn."""
        name = "of the tokenizer" if self.chat.template is None else repr(self.chat.template)
        try:
            prompt, other = (self._render((Message("user", text),), True) for text in "ac")
            full = self._render((Message("user", "a"), Message("assistant", "b")), False)
        except ValueError as error:
            raise SlzoError(f"data.task.template {name}: {error}; choose {', '.join(TEMPLATES)}, or a file") from error
        if prompt == other:  # templates of image models read parts of a message instead of its text
            raise SlzoError(
                f"data.task.template {name}: leaves out the text of a message; choose {', '.join(TEMPLATES)}, or a file with a "
                "template that writes message['content']"
            )
        lead, answer, end = full[len(prompt) :].partition("b")
        if not answer or not full.startswith(prompt):
            lead = ""
        # some templates end a turn with white space alone
        return tuple(self._ids_after(prompt, lead)) if lead.strip() else (), (end.strip() or end) if answer else ""

    def _ids_after(self, before: str, text: str) -> list[int]:
        """Return the tokens of a text that follows another one; no token contains characters of both."""
        if not self._adds_space:
            return self._ids(text)
        first, both = self._ids(before), self._ids(before + text)
        return both[len(first) :] if both[: len(first)] == first else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _answer(example: Example) -> str:
    if not example.candidates:
        raise SlzoError(f"{example.location}: has no answer; training and demonstrations need one")
    return example.candidates[0]


def _shorter_versions(turns: tuple[_Turn, ...]) -> list[tuple[_Turn, ...]]:
    """Return shorter versions of a conversation: with fewer and fewer of its oldest turns, then without its system prompt."""
    system = turns[:1] if turns[0].message.is_system else ()
    rest = turns[len(system) :]
    starts = [number for number, turn in enumerate(rest) if turn.message.role == "user" and number]
    last = rest[starts[-1] :] if starts else rest
    return [*((*system, *rest[number:]) for number in starts), last]
