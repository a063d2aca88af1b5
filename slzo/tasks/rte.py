"""RTE: does a premise entail a hypothesis?

Source: https://huggingface.co/datasets/aps/super_glue (config rte); splits: train, validation.
Prompt: ``{premise}⏎Does this mean that "{hypothesis}" is true? Yes or No?⏎``
Candidates: ``Yes``, ``No`` (label 0, 1).
Metrics: accuracy and macro F1.
"""

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, label_field, text_field


class Rte(Task):
    name = "rte"
    kind = Kind.CLASSIFICATION
    hub = HubSource("aps/super_glue", "rte")
    fields = ("premise", "hypothesis", "label")
    candidates = ("Yes", "No")

    def example(self, row: Fields, id: str) -> Example:
        premise, hypothesis = text_field(row, "premise"), text_field(row, "hypothesis")
        prompt = f'{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'
        return Example(id, prompt.strip(" "), self.candidates, label_field(row, 2))
