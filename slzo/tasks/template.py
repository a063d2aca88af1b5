"""A task on the user's own files, described in the config: no Python needed.

Source: ``train_file`` and ``test_file``. Prompt: a template with the row's fields in braces. Metric: accuracy over the
candidates, or token F1 of generated answers.
"""

from collections.abc import Sequence
from string import Formatter

from slzo.errors import SlzoError
from slzo.tasks.base import Example, Kind, Split, Task
from slzo.tasks.fields import Fields, shown


class TemplateTask(Task):
    """Candidates chosen by a label, or free answers, after a prompt made from a template.

    Args:
        prompt: Text with ``{field}`` for the row's fields; ``{{`` and ``}}`` are plain braces.
        candidates: Answer texts, with a leading space where they need one. Empty for generation.
        label_field: Field with the label.
        labels: The rows' labels in the order of the candidates. By default 0, 1, ... or a candidate's own text
            without outer spaces. A row label of -1 means that the row has none.
        answer_field: Generation: field with the answer, a text or a list of texts (the first is trained on).
        train_file: JSON Lines, CSV or Parquet.
        test_file: As ``train_file``.
        name: Name of the task in logs and file names.

    Raises:
        SlzoError: An argument is wrong.
    """

    def __init__(
        self,
        prompt: str,
        candidates: list[str] | None = None,
        label_field: str = "label",
        labels: list[str | int] | None = None,
        answer_field: str | None = None,
        train_file: str | None = None,
        test_file: str | None = None,
        name: str = "custom",
    ) -> None:
        self.name = name
        self.prompt = prompt
        self.candidates = tuple(candidates or ())
        self.label_field = label_field
        self.labels = None if labels is None else tuple(labels)
        self.answer_field = answer_field
        self.train_file, self.test_file = train_file, test_file
        prompt_fields = _fields_of(prompt)
        if answer_field is not None:
            if self.candidates or labels:
                raise SlzoError(
                    f"data.task.answer_field {answer_field!r}: a task generates answers or chooses candidates, not"
                    " both; leave out data.task.candidates and data.task.labels, or data.task.answer_field"
                )
            self.kind = Kind.GENERATION
            self.metric = "f1"
        else:
            self.kind = Kind.CLASSIFICATION
            self._index_of = _label_index(self.candidates, labels)
        self.fields = (*prompt_fields, answer_field or label_field)
        files: dict[Split, str | None] = {"train": train_file, "test": test_file}
        self.files = {split: file for split, file in files.items() if file is not None}

    def example(self, row: Fields, id: str) -> Example:
        missing = [field for field in self.fields if field not in row]
        if missing:
            raise ValueError(f"field {missing[0]!r} is missing; the row has {', '.join(map(str, row))}")
        values = {field: _as_text(row[field], field) for field in self.fields[:-1]}
        prompt = self.prompt.format_map(values).strip(" ")
        if self.answer_field is not None:
            return Example.of_answers(id, prompt, _answers(row[self.answer_field], self.answer_field))
        return Example(id, prompt, self.candidates, self._gold(row[self.label_field]))

    def _gold(self, label: object) -> tuple[int, ...]:
        if isinstance(label, float) and label.is_integer():  # Parquet files made with pandas
            label = int(label)
        if isinstance(label, str | int):
            key = str(label).strip()
            if key in self._index_of:
                return (self._index_of[key],)
            if key == "-1":
                return ()
        raise ValueError(f"field {self.label_field!r} is {shown(label)}; it must be one of {', '.join(self._index_of)}")


def _fields_of(prompt: str) -> tuple[str, ...]:
    allowed = "write fields as {name} and plain braces as {{ and }}"
    try:
        parts = list(Formatter().parse(prompt))
    except ValueError as error:
        raise SlzoError(f"data.task.prompt {prompt!r}: {error}; {allowed}") from None
    fields: list[str] = []
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if not field or spec or conversion or any(char in field for char in ".[]") or field.isdigit():
            raise SlzoError(f"data.task.prompt {prompt!r}: {{{field}}} is not a plain field name; {allowed}")
        if field not in fields:
            fields.append(field)
    if not fields:
        raise SlzoError(f"data.task.prompt {prompt!r}: names no field of the row; {allowed}")
    return tuple(fields)


def _label_index(candidates: Sequence[str], labels: Sequence[str | int] | None) -> dict[str, int]:
    if len(candidates) < 2:
        raise SlzoError(
            f"data.task.candidates {list(candidates)}: give at least two answer texts, or data.task.answer_field to"
            " generate answers"
        )
    texts = [candidate.strip() for candidate in candidates]
    if not all(texts):
        raise SlzoError(f"data.task.candidates {list(candidates)}: a candidate is empty; give each a text")
    if len(set(candidates)) < len(candidates):
        raise SlzoError(f"data.task.candidates {list(candidates)}: a candidate is there twice; make them differ")
    if labels is not None:
        keys = [str(label).strip() for label in labels]
        if len(keys) != len(candidates) or len(set(keys)) < len(keys):
            raise SlzoError(
                f"data.task.labels {list(labels)}: give {len(candidates)} different labels, one a candidate"
            )
        return {key: index for index, key in enumerate(keys)}
    numbers = [str(index) for index in range(len(candidates))]
    if len(set(texts) | set(numbers)) < 2 * len(candidates) or "-1" in texts:
        raise SlzoError(
            f"data.task.candidates {list(candidates)}: cannot be told from row numbers or each other; give the rows'"
            " labels in data.task.labels"
        )
    return {key: index for keys in (numbers, texts) for index, key in enumerate(keys)}


def _as_text(value: object, field: str) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"field {field!r} is {shown(value)}; it must be text or a number")


def _answers(value: object, field: str) -> tuple[str, ...]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    answers = tuple(_as_text(item, field) for item in values)
    if not all(answer.strip() for answer in answers):
        raise ValueError(f"field {field!r} is {shown(value)}; an answer must not be empty")
    return answers
