"""What a reward function is given of a row and its answer."""

from collections.abc import Sequence
from typing import Any

from slzo.rewards.calls import Answers
from slzo.tasks.base import Example

# what stands for the prompt and the answer themselves
_TAKEN = ("prompt", "prompts", "completion", "completions")


def to_reward(answers: Sequence[str], examples: Sequence[Example]) -> Answers:
    """Answers to examples' prompts as reward functions get them.

    Where a row is a conversation (a field with a list of turns), prompts and completions are lists of messages, else texts.
    Columns are the row's fields, and ``references``, the accepted answers, where it has no such field.
    """
    names = {str(name) for example in examples for name in example.columns if name not in _TAKEN}
    columns: dict[str, list[Any]] = {
        name: [example.columns.get(name) for example in examples] for name in sorted(names)
    }
    columns.setdefault("references", [list(example.references) for example in examples])
    talks = [_is_conversation(example) for example in examples]
    prompts: list[Any] = [
        [turn.to_dict() for turn in example.messages] if talk else example.prompt
        for example, talk in zip(examples, talks, strict=True)
    ]
    completions: list[Any] = [
        [{"role": "assistant", "content": answer}] if talk else answer
        for answer, talk in zip(answers, talks, strict=True)
    ]
    return Answers([example.id for example in examples], prompts, completions, columns)


def _is_conversation(example: Example) -> bool:
    fields = example.columns
    return bool(example.messages) and (fields.get("messages") is not None or isinstance(fields.get("prompt"), list))
