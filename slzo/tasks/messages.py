"""Messages of conversations and their format for a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slzo.utils.errors import short_repr

Turns = Literal["all", "last"]

SYSTEM_ROLES = ("system", "developer")
# parts of a turn that templates render, but that are not kept
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Role of the speaker: system, user, assistant, or another role that the model's template supports.
        content: Text of the message.
    """

    role: str
    content: str

    @property
    def is_system(self) -> bool:
        """Whether it is the system prompt."""
        return self.role in SYSTEM_ROLES


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Format of conversations.

    Attributes:
        template: Name of a built-in template, or path of a file with a Jinja template as in Hugging Face; ``None`` for the
            tokenizer's.
        turns: Which of the assistant's turns are trained on and count in the loss.
        system: System prompt of conversations without one; ``None`` for none.
    """

    template: str | None = None
    turns: Turns = "all"
    system: str | None = None

    def with_system(self, turns: tuple[Message, ...]) -> tuple[Message, ...]:
        """Return the turns of a conversation, with the system prompt if they have none."""
        if self.system is None or turns[0].is_system:
            return turns
        return (Message("system", self.system), *turns)


def read_messages(value: object, name: str) -> tuple[Message, ...]:
    """Read the turns in a field of a row: a list of objects with role and content.

    A content may be a list of parts with texts.

    Raises:
        ValueError: The value has another form; the message names field and turn.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        wanted = "a list of turns with role and content"
        raise ValueError(
            f"field {name!r} is {short_repr(value)}; it must be {wanted if name == 'messages' else f'text, or {wanted}'}"
        )
    return tuple(_message(turn, f"{name!r}, turn {number}") for number, turn in enumerate(value, start=1))


def _message(turn: object, where: str) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    for name, value in turn.items() if isinstance(turn, Mapping) else ():
        if (name in _UNSUPPORTED and value) or (name == "weight" and value not in (1, None)):
            raise ValueError(
                f"field {where} has {name} {short_repr(value)}, which is not supported; leave out the row or this part"
            )
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "".join(texts) if texts and all(isinstance(text, str) for text in texts) else None
    if not isinstance(role, str) or not role.strip() or not isinstance(content, str):
        raise ValueError(f"field {where} is {short_repr(turn)}; it must have a role and a content, both text")
    return Message(role, content)
