"""ReCoRD: which entity of a news passage fills the blank in a sentence?

Source: https://huggingface.co/datasets/aps/super_glue (config record); splits: train, validation.
Prompt: the passage with ``@highlight⏎`` replaced by ``- ``, then ``⏎-``.
Candidates: a space and the query with ``@placeholder`` replaced by each entity, in alphabetical order.
Metric: accuracy; any listed answer is correct.
"""

from types import MappingProxyType

from slzo.tasks.base import Example, HubSource, Kind, Task
from slzo.tasks.fields import Fields, text_field, texts_field
from slzo.utils.errors import short_repr


class Record(Task):
    name = "record"
    version = 2  # rows on one passage with different queries are different rows
    kind = Kind.MULTIPLE_CHOICE
    hub = HubSource("aps/super_glue", "record")
    fields = ("passage", "query", "entities", "answers")
    no_label = MappingProxyType({"answers": ()})

    def example(self, row: Fields, id: str) -> Example:
        passage = text_field(row, "passage").replace("@highlight\n", "- ")
        query = text_field(row, "query")
        if "@placeholder" not in query:
            raise ValueError(f"field 'query' is {short_repr(query)}; it must contain @placeholder")
        # the Hub and the official files list the entities in different orders
        entities = sorted(set(texts_field(row, "entities")))
        if not entities:
            raise ValueError("field 'entities' is []; it must name at least one")
        answers = set(texts_field(row, "answers"))
        gold = tuple(i for i, entity in enumerate(entities) if entity in answers)
        if answers and not gold:
            raise ValueError(f"field 'answers' is {short_repr(sorted(answers))}; one of the entities must be an answer")
        candidates = tuple(f" {query.replace('@placeholder', entity)}" for entity in entities)
        return Example(id, f"{passage}\n-".strip(" "), candidates, gold)
