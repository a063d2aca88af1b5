"""COPA: which of two sentences is the effect or the cause of a premise?

Source: https://huggingface.co/datasets/aps/super_glue (config copa); splits: train, validation.
Prompt: the premise without its full stop, then `` so`` (effect) or `` because`` (cause).
Candidates: a space and the choice, its first word in lower case unless it is ``I`` (label 0, 1).
Metric: accuracy.
"""

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, label_field, text_field
from slzo.utils.errors import short_repr


class Copa(Task):
    name = "copa"
    kind = Kind.MULTIPLE_CHOICE
    hub = HubSource("aps/super_glue", "copa")
    fields = ("premise", "choice1", "choice2", "question", "label")
    default_num_dev = 100

    def example(self, row: Fields, id: str) -> Example:
        conjunction = {"effect": "so", "cause": "because"}.get(str(row.get("question")))
        if conjunction is None:
            raise ValueError(f"field 'question' is {short_repr(row.get('question'))}; it must be 'effect' or 'cause'")
        premise = text_field(row, "premise").strip().removesuffix(".")
        choices = tuple(f" {_lower_first_word(text_field(row, name))}" for name in ("choice1", "choice2"))
        return Example(id, f"{premise} {conjunction}", choices, label_field(row, 2))


def _lower_first_word(choice: str) -> str:
    first, space, rest = choice.strip().partition(" ")
    return f"{first if first == 'I' else first.lower()}{space}{rest}"
