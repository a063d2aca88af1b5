"""Convert rows and their answers to the arguments of reward functions, and check that the rows have these."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from slzo.rewards.calls import AnswerBatch
from slzo.tasks.base import Example
from slzo.tasks.fields import is_missing
from slzo.utils.errors import SlzoError

# columns that would hide the prompts and answers
_RESERVED = ("prompt", "prompts", "completion", "completions")


def answer_batch(answers: Sequence[str], examples: Sequence[Example]) -> AnswerBatch:
    """Convert answers to examples' prompts to what reward functions get.

    If a row is a conversation (a field with a list of turns), its prompt and completion are lists of messages; otherwise they are
    texts. The columns are the rows' fields. ``references`` holds the accepted answers, or the field of this name in rows without
    answers; a value that is not a list becomes a list of one text.
    """
    columns: dict[str, list[Any]] = {
        name: [example.columns.get(name) for example in examples] for name in _column_names(examples)
    }
    columns["references"] = [_references(example) for example in examples]
    prompts: list[Any] = []
    completions: list[Any] = []
    for example, answer in zip(examples, answers, strict=True):
        if _is_conversation(example):
            prompts.append([asdict(turn) for turn in example.messages])
            completions.append([{"role": "assistant", "content": answer}])
        else:
            # the text of the row: ``prompt`` also shows a system prompt that the task adds
            prompts.append(example.messages[-1].content if example.messages else example.prompt)
            completions.append(answer)
    return AnswerBatch([example.id for example in examples], prompts, completions, columns)


def check_columns(required: Iterable[tuple[str, Sequence[str]]], examples: Sequence[Example], split: str) -> str | None:
    """Check that rows have the columns that reward functions require, before a model is loaded.

    Args:
        required: Names of functions with the columns that each requires.
        examples: The rows.
        split: Name of the split, for messages.

    Returns:
        A warning about rows without references, if a function requires these; ``None`` if there are none.

    Raises:
        SlzoError: No row has a required column.
    """
    names, warning = _column_names(examples), None
    for function, columns in required:
        for name in columns:
            if name == "references":
                missing = sum(not _references(example) for example in examples)
                if missing:
                    warning = (
                        f"data.reward {function!r}: needs references, but {missing} of {len(examples)} {split} rows have "
                        "none; give their answers in data.task.answer_field, or in a field references"
                    )
            elif name in _RESERVED:
                raise SlzoError(f"data.reward {function!r}: has an argument {name!r}; call it {name}s")
            elif name not in names:
                raise SlzoError(
                    f"data.reward {function!r}: needs {name!r}, which is not a field of the {split} rows (they have "
                    f"{', '.join(names)}); add the field, or give the argument a value in data.reward or a default"
                )
    return warning


def _column_names(examples: Sequence[Example]) -> list[str]:
    return sorted({str(name) for example in examples for name in example.columns if name not in _RESERVED})


def _references(example: Example) -> list[Any]:
    given = example.columns.get("references")
    if example.references or is_missing(given):
        return list(example.references)
    values = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return [str(value) if isinstance(value, int | float) else value for value in values]


def _is_conversation(example: Example) -> bool:
    fields = example.columns
    return bool(example.messages) and (fields.get("messages") is not None or isinstance(fields.get("prompt"), list))
