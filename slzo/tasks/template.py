"""Task on your own files, described in the config without Python.

Source: ``train_file`` (and ``dev_file``, ``test_file``). Prompt: a template with the row's fields in braces. Metric: accuracy
over the candidates, or the ``metrics`` of generated answers, by default token F1.
"""

import json
import math
from collections.abc import Sequence
from string import Formatter
from typing import Any

from slzo.rewards.registry import check_metrics
from slzo.tasks.base import Example, Kind, Split, Task, check_list, check_stop, check_texts
from slzo.tasks.fields import Fields, NamedLabel, is_missing
from slzo.utils.argument_checks import check_at_least
from slzo.utils.console import rank_zero_warn
from slzo.utils.errors import SlzoError, short_repr


class TemplateTask(Task):
    """Candidates chosen by a label, or free answers, after a prompt made from a template.

    Answers are generated if an option for generation is given. A reward does not need an answer in the row.

    Args:
        prompt: Text of one or more lines with ``{field}`` for the row's fields; ``{{`` and ``}}`` are plain braces. Spaces at
            both ends are removed.
        candidates: Answer texts, with a leading space if they need one. Empty for generation.
        label_field: Field with the label.
        labels: The rows' labels in the order of the candidates. By default 0, 1, ... or a candidate's own text
            without leading and trailing spaces. If a ``ClassLabel`` of datasets names the numbers (rows from Python, the Hub or
            Parquet), its names work too. A row label of -1, null, or an empty cell means that the row has none.
        answer_field: Generation: field with the answer, a text or a list of texts (the first is trained on).
        references_field: Generation: field with further accepted answers, a text or a list of texts.
        stop: Generation: texts that end an answer; answers to train on end with the first one; by default a newline.
        max_new_tokens: Generation: longest answer, in tokens; by default 50.
        metrics: Generation: metrics of held-out rows; the first one summarizes a run. Choose perplexity, or for generated
            answers f1, exact_match and other built-in rewards; by default f1 and exact_match, or only the reward if the rows
            have no answers.
        train_file: JSON Lines, JSON, CSV or Parquet.
        dev_file: As ``train_file``; by default dev rows are drawn from the training rows.
        test_file: As ``train_file``; by default held-out rows are drawn from the training rows.
        name: Name of the task in logs and file names.
        id_field: Field with a row's id for predictions and messages, unique over all files; by default id, query_id or
            idx, else the row's position.

    Raises:
        SlzoError: An argument is wrong.
    """

    def __init__(
        self,
        prompt: str,
        candidates: list[str] | None = None,
        label_field: str = "label",
        labels: list[str | int | float] | None = None,
        answer_field: str | None = None,
        train_file: str | None = None,
        test_file: str | None = None,
        name: str = "custom",
        dev_file: str | None = None,
        references_field: str | None = None,
        stop: list[str] | None = None,
        max_new_tokens: int | None = None,
        metrics: list[str] | None = None,
        id_field: str | None = None,
    ) -> None:
        for option, value in {"labels": labels, "metrics": metrics}.items():
            check_list(f"data.task.{option}", value)
        check_texts("data.task.candidates", candidates or ())
        self.name, self.id_field = name, id_field
        self.prompt = prompt
        self.candidates = tuple(candidates or ())
        self.label_field = label_field
        self.labels = None if labels is None else tuple(labels)
        self.answer_field, self.references_field = answer_field, references_field
        self.train_file, self.dev_file, self.test_file = train_file, dev_file, test_file
        self._in_prompt = _fields_of(prompt)
        if r"\n" in prompt:
            rank_zero_warn(
                f"data.task.prompt {prompt!r}: contains a backslash and an n instead of a line break; for a line break write "
                r"$'...\n...' in a shell, or double quotes in YAML"
            )
        generation = {
            "answer_field": answer_field,
            "references_field": references_field,
            "max_new_tokens": max_new_tokens,
            "stop": stop,
            "metrics": metrics,
        }
        given = [name for name, value in generation.items() if value is not None]
        generates = bool(given)
        if generates and (self.candidates or labels):
            raise SlzoError(
                f"data.task.{given[0]} {generation[given[0]]!r}: a task generates answers or chooses candidates, not"
                f" both; leave out data.task.candidates and data.task.labels, or data.task.{given[0]}"
            )
        if generates:
            self.kind = Kind.GENERATION
            self.max_new_tokens = Task.max_new_tokens if max_new_tokens is None else max_new_tokens
            check_at_least("data.task.max_new_tokens", self.max_new_tokens)
            self.stop = check_stop(Task.stop if stop is None else stop)
            if not self.stop:
                raise SlzoError("data.task.stop []: give at least one text that ends an answer, or leave it out")
            has_answers = answer_field is not None or references_field is not None
            default_metrics = Task.metrics if has_answers else ()
            self.metrics = default_metrics if metrics is None else check_metrics(metrics)
            if self.metrics and not has_answers:
                reward = "data.reward json_valid" if "json_valid" in self.metrics else "a data.reward"
                raise SlzoError(
                    f"data.task.metrics {list(self.metrics)}: only rows with answers are scored; name their field in "
                    f"data.task.answer_field, or leave metrics out and use {reward}"
                )
            self.metric = self.metrics[0] if self.metrics else "reward"
            self.no_label = {} if answer_field is None else {answer_field: ()}
        else:
            _check_spaces(prompt, self.candidates)
            self.kind = Kind.CLASSIFICATION
            self._index_of = _label_index(self.candidates, labels)
            self._named = frozenset(self._index_of if labels else map(str.strip, self.candidates))
            self.no_label = {label_field: ""}
        if references_field is not None:
            self.optional_fields = {"data.task.references_field": references_field}
        needed = (*self._in_prompt, answer_field if generates else label_field, id_field)
        self.fields = tuple(field for field in needed if field is not None)
        files: dict[Split, str | None] = {"train": train_file, "dev": dev_file, "test": test_file}
        self.files = {split: file for split, file in files.items() if file is not None}

    def example(self, row: Fields, id: str) -> Example:
        values = {field: _as_text(row[field], field) for field in self._in_prompt}
        prompt = self.prompt.format_map(values).strip(" ")
        if self.kind is Kind.GENERATION:
            return Example.from_answers(id, prompt, self._answers(row), self.stop[0])
        return Example(id, prompt, self.candidates, self._gold(row[self.label_field]), labels=self.labels or ())

    def options_to_predict(self) -> dict[str, Any]:
        """Return the constructor's arguments for rows to predict, without files."""
        names = ["prompt", "label_field", "name", "id_field"]
        if self.kind is Kind.GENERATION:
            names += ["answer_field", "references_field", "stop", "max_new_tokens", "metrics"]
        else:
            names += ["candidates", "labels"]
        return {name: value for name in names if (value := getattr(self, name))}

    def _answers(self, row: Fields) -> tuple[str, ...]:
        """Return the accepted answers, the one to train on first; empty if the row has no such field."""
        answers: tuple[str, ...] = ()
        for field in (self.answer_field, self.references_field):
            if field is not None and not is_missing(row.get(field)):
                answers += _answer_texts(row[field], field)
        for end in self.stop:
            if any(end in answer.strip() for answer in answers):
                raise ValueError(
                    f"an answer contains {end!r}, which is a stop text; give other texts in data.task.stop"
                )
        return tuple(dict.fromkeys(answers))

    def _gold(self, label: object) -> tuple[int, ...]:
        if isinstance(label, NamedLabel) and not self._named.isdisjoint(label.names):
            label = label.name
        if isinstance(label, float) and label.is_integer():  # Parquet files made with pandas
            label = int(label)
        if isinstance(label, str | int | float):
            text = json.dumps(label) if isinstance(label, bool) else str(label).strip()
            # pandas writes 1.0 in columns with gaps, and among the labels 0.5 and 1.0 the second one is read as 1
            for key in (text, text.removesuffix(".0"), f"{text}.0", str(label)):
                if key in self._index_of:
                    return (self._index_of[key],)
            if text in ("-1", "-1.0", ""):
                return ()
        hint = '; name true and false in data.task.labels, as in ["false", "true"]' if isinstance(label, bool) else ""
        allowed = ", ".join(self._index_of)
        raise ValueError(
            f"field {self.label_field!r} is {short_repr(label)}; it must be one of {allowed} (data.task.labels){hint}"
        )


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


def _check_spaces(prompt: str, candidates: Sequence[str]) -> None:
    """Refuse a space between prompt and candidate that is part of the prompt, and warn if there is none."""
    glued = next((text for text in candidates if text and not text[0].isspace()), None)
    if glued is None:
        return
    advice = f"begin each candidate with a space, as in {' ' + glued!r}"
    if prompt.endswith(" "):
        raise SlzoError(
            f"data.task.prompt {prompt!r}: spaces at its end are removed, and candidate {glued!r} has none; {advice}"
        )
    last = prompt[-1:]
    if last.isascii() and (last.isalnum() or last in ".,:;?!") and glued[0].isascii() and glued[0].isalnum():
        rank_zero_warn(
            f"data.task.candidates {list(candidates)}: {glued!r} follows {prompt[-10:]!r} without a space; {advice}"
        )


def _label_index(candidates: Sequence[str], labels: Sequence[str | int | float] | None) -> dict[str, int]:
    if len(candidates) < 2:
        raise SlzoError(
            f"data.task.candidates {list(candidates)}: give at least two answer texts; for generated answers,"
            " data.task.answer_field, or without answers data.task.max_new_tokens and a data.reward"
        )
    texts = [candidate.strip() for candidate in candidates]
    if not all(texts):
        raise SlzoError(f"data.task.candidates {list(candidates)}: a candidate is empty; give each a text")
    if len(set(candidates)) < len(candidates):
        raise SlzoError(f"data.task.candidates {list(candidates)}: two candidates are equal; make them differ")
    if labels is not None:
        if not all(isinstance(label, str | int | float) for label in labels):
            raise SlzoError(f'data.task.labels {list(labels)}: give texts and numbers, such as ["no", "yes"]')
        keys = [str(label).strip() for label in labels]
        if len(keys) != len(candidates) or len(set(keys)) < len(keys):
            raise SlzoError(
                f"data.task.labels {list(labels)}: give {len(candidates)} different labels, one per candidate"
            )
        return {key: index for index, key in enumerate(keys)}
    numbers = [str(index) for index in range(len(candidates))]
    values = [text.removesuffix(".0") for text in texts]  # of numbers; a label 1.0 may mean the candidate or its number
    if len({*texts, *numbers}) < 2 * len(candidates) or {*values} & {*numbers, "-1"}:
        raise SlzoError(
            f"data.task.candidates {list(candidates)}: equal apart from spaces, or equal to a number that can be a label;"
            " give the rows' labels in data.task.labels"
        )
    return {key: index for keys in (numbers, texts) for index, key in enumerate(keys)}


def _is_text_or_number(value: object) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _as_text(value: object, field: str) -> str:
    if _is_text_or_number(value):
        return str(value)
    raise ValueError(f"field {field!r} is {short_repr(value)}; it must be text or a number")


def _answer_texts(value: object, field: str) -> tuple[str, ...]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    if not all(map(_is_text_or_number, values)):
        raise ValueError(
            f"field {field!r} is {short_repr(value)}; answers must be texts or numbers, one or a list of them"
        )
    answers = tuple(map(str, values))
    if not all(answer.strip() for answer in answers):
        raise ValueError(f"field {field!r} is {short_repr(value)}; an answer must not be empty")
    return answers
