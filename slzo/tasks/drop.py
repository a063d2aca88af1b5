"""DROP: a question that needs reasoning (counting, sorting) over a passage.

Source: https://huggingface.co/datasets/ucinlp/drop; splits: train, validation.
Prompt: ``Passage: {passage}⏎Question: {question}⏎Answer:``, the question without outer white space.
Target: a space, the first answer and a newline.
Metric: token F1, best over the answers; also exact match.
"""

from types import MappingProxyType

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, text_field, texts_field


class Drop(Task):
    name = "drop"
    kind = Kind.GENERATION
    hub = HubSource("ucinlp/drop")
    fields = ("passage", "question", "answers_spans")
    no_label = MappingProxyType({"answers_spans": {"spans": ()}})
    metric = "f1"

    def example(self, row: Fields, id: str) -> Example:
        passage, question = text_field(row, "passage"), text_field(row, "question").strip()
        prompt = f"Passage: {passage}\nQuestion: {question}\nAnswer:"
        return Example.from_answers(id, prompt, texts_field(row, "answers_spans", "spans"))
