"""WSC: does a pronoun refer to a given noun?

Source: https://huggingface.co/datasets/aps/super_glue (config wsc.fixed); splits: train, validation.
Prompt: ``{text}⏎In the previous sentence, does the pronoun "{span2 in lower case}" refer to {span1}? Yes or No?⏎``
Candidates: ``No``, ``Yes`` (label 0, 1).
Metrics: accuracy and macro F1.
"""

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, label_field, text_field


class Wsc(Task):
    name = "wsc"
    kind = Kind.CLASSIFICATION
    hub = HubSource("aps/super_glue", "wsc.fixed")
    fields = ("text", "span1_text", "span2_text", "label")
    candidates = ("No", "Yes")

    def example(self, row: Fields, id: str) -> Example:
        text, noun = text_field(row, "text"), text_field(row, "span1_text")
        pronoun = text_field(row, "span2_text").lower()
        prompt = f'{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?\n'
        return Example(id, prompt.strip(" "), self.candidates, label_field(row, 2))
