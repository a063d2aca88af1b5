"""SQuAD 1.1: a question whose answer is a span of the context.

Source: https://huggingface.co/datasets/rajpurkar/squad; splits: train, validation.
Prompt: ``Title: {title}⏎Context: {context}⏎Question: {question}⏎Answer:``, the question without outer white space.
Target: a space, the first answer and a newline.
Metric: token F1, best over the answers; also exact match.
"""

from types import MappingProxyType

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, text_field, texts_field


class Squad(Task):
    name = "squad"
    kind = Kind.GENERATION
    hub = HubSource("rajpurkar/squad")
    fields = ("title", "context", "question", "answers")
    no_label = MappingProxyType({"answers": {"text": ()}})
    metric = "f1"

    def example(self, row: Fields, id: str) -> Example:
        title, context = text_field(row, "title"), text_field(row, "context")
        question = text_field(row, "question").strip()
        prompt = f"Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:"
        return Example.from_answers(id, prompt, texts_field(row, "answers", "text"))
