"""Convert rows and their answers to the arguments of reward functions."""

from collections.abc import Sequence
from typing import Any

from slzo.rewards.calls import RewardInputs
from slzo.tasks.base import Example

# columns that would hide the prompts and answers
_RESERVED = ("prompt", "prompts", "completion", "completions")


def reward_inputs(answers: Sequence[str], examples: Sequence[Example]) -> RewardInputs:
    """Convert answers to examples' prompts to what reward functions get.

    If a row is a conversation (a field with a list of turns), its prompt and completion are lists of messages; otherwise they are
    texts. The columns are the rows' fields. ``references`` holds the accepted answers of rows without this field. A text in it
    becomes a list of one.
    """
    names = {str(name) for example in examples for name in example.columns if name not in _RESERVED}
    columns: dict[str, list[Any]] = {
        name: [example.columns.get(name) for example in examples] for name in sorted(names)
    }
    columns["references"] = [_references(example) for example in examples]
    prompts: list[Any] = []
    completions: list[Any] = []
    for example, answer in zip(examples, answers, strict=True):
        if _is_conversation(example):
            prompts.append([turn.to_dict() for turn in example.messages])
            completions.append([{"role": "assistant", "content": answer}])
        else:
            # the text of the row: ``prompt`` also shows a system prompt that the task adds
            prompts.append(example.messages[-1].content if example.messages else example.prompt)
            completions.append(answer)
    return RewardInputs([example.id for example in examples], prompts, completions, columns)


def _references(example: Example) -> Any:
    given = example.columns.get("references")
    if given is None:
        return list(example.references)
    return [given] if isinstance(given, str) else given


def _is_conversation(example: Example) -> bool:
    fields = example.columns
    return bool(example.messages) and (fields.get("messages") is not None or isinstance(fields.get("prompt"), list))
