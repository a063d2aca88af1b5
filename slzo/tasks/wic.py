"""WiC: does a word have the same sense in two sentences?

Source: https://huggingface.co/datasets/aps/super_glue (config wic); splits: train, validation.
Prompt: ``Does the word "{word}" have the same meaning in these two sentences? Yes, No?⏎{sentence1}⏎{sentence2}⏎``
Candidates: ``No``, ``Yes`` (label 0, 1).
Metrics: accuracy and macro F1.
"""

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, label_field, text_field


class Wic(Task):
    name = "wic"
    kind = Kind.CLASSIFICATION
    hub = HubSource("aps/super_glue", "wic")
    fields = ("word", "sentence1", "sentence2", "label")
    candidates = ("No", "Yes")

    def example(self, row: Fields, id: str) -> Example:
        word = text_field(row, "word")
        first, second = text_field(row, "sentence1"), text_field(row, "sentence2")
        question = f'Does the word "{word}" have the same meaning in these two sentences? Yes, No?'
        prompt = f"{question}\n{first}\n{second}\n"
        return Example(id, prompt.strip(" "), self.candidates, label_field(row, 2))
