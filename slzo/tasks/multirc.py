"""MultiRC: is an answer to a question about a paragraph correct? Each row is one answer; a question has several rows.

Source: https://huggingface.co/datasets/aps/super_glue (config multirc); splits: train, validation.
Prompt: ``{paragraph}⏎Question: {question}⏎I found this answer "{answer}". Is that correct? Yes or No?⏎``
Candidates: ``No``, ``Yes`` (label 0, 1).
Metrics: accuracy over answers (as in MeZO) and macro F1; also F1 of the correct answers and exact match per question.
"""

from collections.abc import Mapping

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, label_field, text_field


class MultiRc(Task):
    name = "multirc"
    kind = Kind.CLASSIFICATION
    hub = HubSource("aps/super_glue", "multirc")
    fields = ("paragraph", "question", "answer", "label")
    grouped = True
    candidates = ("No", "Yes")

    def example(self, row: Fields, id: str) -> Example:
        paragraph, question = text_field(row, "paragraph"), text_field(row, "question")
        answer = text_field(row, "answer", allow_empty=True)
        prompt = f'{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'
        index = row.get("idx")
        if isinstance(index, Mapping) and {"paragraph", "question"} <= index.keys():
            group = f"{index['paragraph']}-{index['question']}"
        else:
            group = f"{paragraph}\n{question}"
        return Example(id, prompt.strip(" "), self.candidates, label_field(row, 2), group=group)
