"""Examples of generation tasks, which have answers in place of candidates."""

from collections.abc import Sequence

from slzo.tasks.base import Example


def answer_example(id: str, prompt: str, answers: Sequence[str]) -> Example:
    """Example trained on the first answer, closed by a newline, and scored against all of them; none: no label."""
    references = tuple(answer.strip() for answer in answers)
    target = (f" {references[0]}\n",) if references else ()
    return Example(id, prompt.strip(" "), target, gold=(0,) if references else (), references=references)
