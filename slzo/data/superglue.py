"""Convert rows of the official SuperGLUE download (https://super.gluebenchmark.com/tasks) to the Hub's fields.

The official files have string and boolean labels, a nested ``target`` (WSC), and one line per passage (MultiRC, ReCoRD).
A row that already has the Hub's fields does not change. The Hub's ``wsc.fixed`` corrects the capitals of a few noun
spans of the official file ("The table" for "the table"); the conversion does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slzo.tasks.fields import Fields
from slzo.utils.errors import short_repr

FOLDERS: Mapping[str, str] = {
    name.lower(): name for name in ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC")
}
"""Names of the tasks' folders in the download."""

_BOOLEAN_TASKS = frozenset({"boolq", "wic", "wsc"})
_LABELS: Mapping[str, tuple[str, ...]] = {
    "rte": ("entailment", "not_entailment"),
    "cb": ("entailment", "contradiction", "neutral"),
}


def hub_rows(task: str, row: Fields) -> Iterator[Fields]:
    """Yield the rows that one line contains, with the Hub's fields.

    Raises:
        ValueError: The line has the official format, but a part is missing or has the wrong type.
    """
    if task == "multirc" and "passage" in row:
        yield from _multirc(row)
    elif task == "record" and isinstance(row.get("passage"), Mapping):
        yield from _record(row)
    else:
        if task == "wsc" and "target" in row:
            row = {**row, **_part(row, "target", Mapping)}
        label = row.get("label")
        if task in _BOOLEAN_TASKS and isinstance(label, bool):
            row = {**row, "label": int(label)}
        elif task in _LABELS and isinstance(label, str):
            names = _LABELS[task]
            if label not in names:
                raise ValueError(f"field 'label' is {short_repr(label)}; it must be one of {', '.join(names)}")
            row = {**row, "label": names.index(label)}
        yield row


def _multirc(row: Fields) -> Iterator[Fields]:
    passage = _part(row, "passage", Mapping)
    for question in _objects(passage, "questions"):
        for answer in _objects(question, "answers"):
            yield {
                "paragraph": passage.get("text"),
                "question": question.get("question"),
                "answer": answer.get("text"),
                "label": answer.get("label", -1),
                "idx": {"paragraph": row.get("idx"), "question": question.get("idx"), "answer": answer.get("idx")},
            }


def _record(row: Fields) -> Iterator[Fields]:
    passage = _part(row, "passage", Mapping)
    text = _part(passage, "text", str)
    # the end of an entity is the index of its last character
    spans = [(_part(entity, "start", int), _part(entity, "end", int)) for entity in _objects(passage, "entities")]
    for query in _objects(row, "qas"):
        yield {
            "passage": text,
            "query": query.get("query"),
            "entities": [text[start : end + 1] for start, end in spans],
            "answers": [_part(answer, "text", str) for answer in query.get("answers") or ()],
            "idx": {"passage": row.get("idx"), "query": query.get("idx")},
        }


def _part(row: Fields, name: str, expected: type) -> Any:
    value = row.get(name)
    if not isinstance(value, expected):
        wanted = {str: "text", int: "a number", Mapping: "an object", Sequence: "a list"}[expected]
        raise ValueError(f"field {name!r} is {short_repr(value)}; it must be {wanted}")
    return value


def _objects(row: Fields, name: str) -> Sequence[Fields]:
    values = _part(row, name, Sequence)
    if not all(isinstance(value, Mapping) for value in values):
        raise ValueError(f"field {name!r} is {short_repr(values)}; it must be a list of objects")
    return values
