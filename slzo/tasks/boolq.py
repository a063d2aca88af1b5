"""BoolQ: a yes/no question about a passage.

Source: https://huggingface.co/datasets/aps/super_glue (config boolq); splits: train, validation.
Prompt: ``{passage} {Question}?⏎``, the question with a capital letter and a question mark.
Candidates: ``No``, ``Yes`` (label 0, 1).
Metrics: accuracy and macro F1.
"""

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, label_field, text_field


class BoolQ(Task):
    name = "boolq"
    kind = Kind.CLASSIFICATION
    hub = HubSource("aps/super_glue", "boolq")
    fields = ("passage", "question", "label")
    candidates = ("No", "Yes")

    def example(self, row: Fields, id: str) -> Example:
        question = text_field(row, "question").strip()
        question = question[0].upper() + question[1:]
        if not question.endswith("?"):
            question += "?"
        prompt = f"{text_field(row, 'passage')} {question}\n"
        return Example(id, prompt.strip(" "), self.candidates, label_field(row, 2))
