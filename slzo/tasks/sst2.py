"""SST-2: is a sentence of a movie review negative or positive?

Source: https://huggingface.co/datasets/nyu-mll/glue (config sst2); splits: train, validation.
Prompt: ``{sentence} It was``, the sentence without outer white space.
Candidates: ``" terrible"``, ``" great"`` (label 0, 1).
Metrics: accuracy and macro F1.
"""

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, label_field, text_field


class Sst2(Task):
    name = "sst2"
    kind = Kind.CLASSIFICATION
    hub = HubSource("nyu-mll/glue", "sst2")
    fields = ("sentence", "label")
    candidates = (" terrible", " great")

    def example(self, row: Fields, id: str) -> Example:
        prompt = f"{text_field(row, 'sentence').strip()} It was"
        return Example(id, prompt.strip(" "), self.candidates, label_field(row, 2))
