"""Conversations: what was said by whom, and how it is written down for a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slzo.tasks.fields import shown

Turns = Literal["all", "last"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks: system, user, assistant, or what else the model's template knows.
        content: What is said.
    """

    role: str
    content: str

    def to_dict(self) -> dict[str, str]:
        """As templates and reward functions expect it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a conversation becomes a sequence.

    Attributes:
        template: Name of a template of slzo, or the path of a file with one (Jinja, as Hugging Face's); ``None``: the
            tokenizer's.
        turns: Which of the assistant's turns are trained on and counted in the loss.
    """

    template: str | None = None
    turns: Turns = "all"


def read_messages(value: object, name: str) -> tuple[Message, ...]:
    """The turns in a field of a row: a list of objects with role and content.

    A content may be a list of parts, as of models that see images; only their texts are taken.

    Raises:
        ValueError: It is something else; the message has field and turn.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"field {name!r} is {shown(value)}; it must be a list of turns with role and content")
    return tuple(_message(turn, f"{name!r}, turn {number}") for number, turn in enumerate(value, start=1))


def _message(turn: object, where: str) -> Message:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "".join(texts) if texts and all(isinstance(text, str) for text in texts) else None
    if not isinstance(role, str) or not role.strip() or not isinstance(content, str):
        raise ValueError(f"field {where} is {shown(turn)}; it must have a role and a content, both text")
    return Message(role, content)
