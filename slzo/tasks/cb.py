"""CommitmentBank: does a premise entail, contradict or leave open a hypothesis?

Source: https://huggingface.co/datasets/aps/super_glue (config cb); splits: train, validation.
Prompt: ``Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?⏎``
Candidates: ``Yes``, ``No``, ``Maybe`` (label 0, 1, 2).
Metrics: accuracy and macro F1.
"""

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, label_field, text_field


class Cb(Task):
    name = "cb"
    kind = Kind.CLASSIFICATION
    hub = HubSource("aps/super_glue", "cb")
    fields = ("premise", "hypothesis", "label")
    default_num_dev = 100
    candidates = ("Yes", "No", "Maybe")

    def example(self, row: Fields, id: str) -> Example:
        premise, hypothesis = text_field(row, "premise"), text_field(row, "hypothesis")
        prompt = f'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
        return Example(id, prompt.strip(" "), self.candidates, label_field(row, 3))
