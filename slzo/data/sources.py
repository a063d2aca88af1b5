"""Load a task's rows from the user's files, a folder, a package or the Hugging Face Hub."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from slzo.data.files import READERS, BadRows, PlacedRow, read_file
from slzo.data.hub import read_hub
from slzo.data.superglue import FOLDERS, hub_rows
from slzo.tasks.base import Example, HubSource, Split, Task, example_of, rows_of
from slzo.tasks.fields import Fields, check_characters, is_missing
from slzo.utils.console import rank_zero_warn
from slzo.utils.errors import RowError, SlzoError, one_line, short_repr
from slzo.utils.files import expanded
from slzo.utils.hub import split_revision

FILE_STEMS: Mapping[Split, tuple[str, ...]] = {"train": ("train",), "test": ("validation", "val")}
"""File names in a data folder, without extension. Test rows come from the validation split, as in MeZO."""

_IDX_PARTS = ("paragraph", "passage", "question", "query", "answer")
_NUMBERS = re.compile(r"-?\d+(-\d+)*")


@dataclass(frozen=True)
class SourceRows:
    """Rows of a split in the order of the source, and a note about those that were left out, empty if there are none.

    If they come from a data set of the Hub, the revision of ``hub`` is the commit that was loaded.
    """

    examples: list[Example]
    note: str = ""
    hub: HubSource | None = None


@dataclass(frozen=True)
class RowSource:
    """Where a task's rows come from: its own file, ``data_dir``, the rows that come with the task, or the Hub.

    The first of these that applies is read. For the options see :class:`slzo.task_data.TaskData`; ``data_dir`` may also be the
    task's own folder. With ``columns``, the fields of each row are kept in :attr:`Example.columns`.
    """

    task: Task
    data_dir: str | None = None
    hub_path: str | None = None
    hub_config: str | None = None
    columns: bool = False
    skip_bad_rows: bool = False

    def unused_warning(self) -> str | None:
        """Return a warning about a source of rows that the task's own files or data_dir replace."""
        given = {"data_dir": self.data_dir, "hub_path": self.hub_path, "hub_config": self.hub_config}
        if "train" in self.task.files:
            reason = f"task {self.task.name!r} has its own files, such as {self.task.files['train']}"
        elif given.pop("data_dir") is not None:
            reason = f"the rows are read from data.data_dir {self.data_dir!r}"
        else:
            return None
        unused = [f"data.{name} {value!r}" for name, value in given.items() if value is not None]
        return f"{', '.join(unused)}: not used, because {reason}; leave it out" if unused else None

    def read(self, split: Split) -> SourceRows:
        """Read ``"train"``, ``"test"`` (the Hub's validation split), or ``"dev"`` for a task with a dev file.

        Raises:
            SlzoError: The source is missing, broken or empty, a field is missing or has the wrong type, a label does not match
                the candidates, a prompt or candidate is empty, or two rows have the same id.
        """
        bad = BadRows(self.skip_bad_rows)
        origin, placed, hub = self._open(split, bad)
        return replace(self._usable(split, origin, placed, bad), hub=hub)

    def read_to_predict(self, file: str) -> SourceRows:
        """Read a file with rows to predict, which need no labels; errors as for :meth:`read`."""
        bad = BadRows(self.skip_bad_rows)
        rows = read_file(_existing(file, "data.predict_file"), bad)
        placed = ((place, {**row, **_missing_labels(self.task, row)}) for place, row in rows)
        return self._usable("test", file, placed if self.task.files else _hub_fields(self.task, placed, bad), bad)

    def _usable(self, split: Split, origin: str, placed: Iterable[PlacedRow], bad: BadRows) -> SourceRows:
        """Return the rows that can be used; errors of the others are added to ``bad``."""
        examples: list[Example] = []
        places: dict[str, str] = {}
        empty: Counter[str] = Counter()
        found: set[str] = set()
        for place, values in placed:
            position = len(examples) + len(bad.errors)  # bad rows count, so that other ids stay the same
            # JSON and Parquet have null in place of an empty cell; a row without the field is broken
            empty_labels = _missing_labels(self.task, values).items()
            values = {**values, **{name: none for name, none in empty_labels if name in values}}
            try:
                example = _example(self.task, split, values, position)
                if example.id in places:
                    raise ValueError(
                        f"id {example.id!r} is also the id of {places[example.id]}; give each row its own id"
                    )
            except ValueError as error:
                bad.add(RowError(f"{place}: {one_line(error, None)}"))
                continue
            places[example.id] = place
            columns = _without_placeholders(self.task, values) if self.columns else {}
            examples.append(replace(example, place=place, columns=columns))
            empty.update(_empty_fields(self.task, values))
            found.update(values)
        for option, name in self.task.optional_fields.items():
            if examples and name not in found:
                rank_zero_warn(f"{option} {name!r}: no row of {origin} has this field; correct it, or leave it out")
        if not examples and not bad.errors:
            raise SlzoError(f"{origin}: holds no rows; task {self.task.name!r} needs at least one")
        notes = [
            f"{count} of {len(examples)} rows of {origin} have an empty {name!r}." for name, count in empty.items()
        ]
        return SourceRows(examples, "\n".join(filter(None, [bad.report(len(examples), origin), *notes])))

    def _open(self, split: Split, bad: BadRows) -> tuple[str, Iterable[PlacedRow], HubSource | None]:
        """Return the name of the source, for messages, its rows, and the data set of the Hub if it is one."""
        task = self.task
        if split in task.files:
            option = f"data.task.{split}_file"
            if not hasattr(task, f"{split}_file"):  # a class of the user has its own arguments
                option = f"data.task {task.name!r}, {split} file"
            path = _existing(task.files[split], option)
            return str(path), read_file(path, bad), None
        if self.data_dir is not None:
            path = _find_file(task, split, expanded(self.data_dir))
            return str(path), _hub_fields(task, read_file(path, bad), bad), None
        if self.hub_path is None:
            own = rows_of(task, split)
            if own is not None:
                origin = f"the {split} rows of {task.name!r}"
                return origin, ((f"{origin}, row {number}", row) for number, row in enumerate(own, start=1)), None
        source, (other, revision) = task.hub, split_revision(self.hub_path or "")
        if other and (source is None or other != source.path):
            source = HubSource(other)  # another data set has other configurations
        if source is None:
            raise SlzoError(f"data.task.{split}_file None: task {task.name!r} has no {split} rows; give a file")
        config = source.config if self.hub_config is None else self.hub_config
        revision = revision or source.revision
        option = f"data.task {task.name!r}" if self.hub_path is None else f"data.hub_path {self.hub_path!r}"
        origin, rows, commit = read_hub(replace(source, config=config, revision=revision), split, option)
        placed = ((f"{origin} row {number}", row) for number, row in enumerate(rows, start=1))
        return origin, placed, replace(source, config=config, revision=commit)


def _example(task: Task, split: Split, values: Fields, position: int) -> Example:
    """Turn a row into an example; raise ValueError with the reason if it cannot be used."""
    missing = [field for field in task.fields if values.get(field) is None]
    if missing:
        present = ", ".join(str(name) for name in _without_placeholders(task, values) if values[name] is not None)
        wanted = ", ".join(task.fields)
        raise ValueError(
            f"field {missing[0]!r} is missing; task {task.name!r} needs it (in all: {wanted}), and the row has {present}"
        )
    for field in task.fields:
        if isinstance(values[field], float) and math.isnan(values[field]):
            raise ValueError(f"field {field!r} is nan, as pandas writes a missing value; fill it, or leave the row out")
    example = example_of(task, values, row_id(values, position, split, task.id_field))
    if not example.prompt.strip():
        raise ValueError("the prompt is empty; give its fields some text")
    for candidate in example.candidates:
        if not candidate.strip():
            raise ValueError(f"candidate {candidate!r} is empty; give it some text")
    turns = (turn.content for turn in example.messages)
    for text in (example.id, example.prompt, *example.candidates, *example.references, *turns):
        check_characters(text)
    return example


def row_id(values: Fields, position: int, split: Split, field: str | None = None) -> str:
    """Return the id of a row: its ``id``, ``query_id`` or ``idx`` (MultiRC: ``paragraph-question-answer``), else its position.

    Numbers start from 0 in every split, so numeric ids of training rows get the prefix ``train-`` (dev rows: ``dev-``) to stay
    unique. If the user named a ``field``, its value is the id.

    Raises:
        ValueError: The id is neither text nor a whole number.
    """
    known = ("id", "query_id", "idx") if field is None else (field,)
    name = next((name for name in known if values.get(name) is not None), None)
    value = position if name is None else values[name]
    if isinstance(value, float) and value.is_integer():  # Parquet files made with pandas
        value = int(value)
    parts = [value[part] for part in _IDX_PARTS if part in value] if isinstance(value, Mapping) else [value]
    if not parts or not all(
        isinstance(part, str | int) and not isinstance(part, bool) and part != "" for part in parts
    ):
        raise ValueError(f"field {name!r} is {short_repr(value)}; an id must be text or a whole number")
    id = "-".join(map(str, parts))
    return f"{split}-{id}" if field is None and split != "test" and _NUMBERS.fullmatch(id) else id


def _existing(file: str, option: str) -> Path:
    """Return the path of a file; raise SlzoError if there is none."""
    path = expanded(file)
    if not path.is_file():
        reason = "is a folder; give a file" if path.is_dir() else "no such file; give an existing one"
        raise SlzoError(f"{option} {str(path)!r}: {reason}")
    return path


def _missing_labels(task: Task, values: Fields) -> dict[str, Any]:
    return {name: none for name, none in task.no_label.items() if is_missing(values.get(name))}


def _without_placeholders(task: Task, values: Fields) -> Fields:
    """Return the fields of a row as it was read, without the values that stand for a missing label."""
    return {name: value for name, value in values.items() if name not in task.no_label or value != task.no_label[name]}


def _empty_fields(task: Task, values: Fields) -> list[str]:
    """Return the fields of the prompt that have no text; only the user's own template accepts such a row."""
    texts = {name: values[name] for name in task.fields if name not in task.no_label}
    return [name for name, value in texts.items() if isinstance(value, str) and not value.strip()]


def _find_file(task: Task, split: Split, root: Path) -> Path:
    if not root.is_dir():
        reason = "is a file" if root.exists() else "no such folder"
        raise SlzoError(f"data.data_dir {str(root)!r}: {reason}; give one with {task.name}/train.jsonl and so on")
    folders = [root / task.name, *([root / FOLDERS[task.name]] if task.name in FOLDERS else []), root]
    for folder, stem, suffix in product(folders, FILE_STEMS[split], READERS):
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    raise SlzoError(
        f"data.data_dir {str(root)!r}: the {split} split of task {task.name!r} is missing; looked for "
        f"{' or '.join(FILE_STEMS[split])} with {', '.join(READERS)} in {', '.join(map(str, folders))}"
    )


def _hub_fields(task: Task, placed: Iterable[PlacedRow], bad: BadRows) -> Iterator[PlacedRow]:
    for place, values in placed:
        try:
            rows = list(hub_rows(task.name, values))
        except ValueError as error:
            bad.add(RowError(f"{place}: {one_line(error, None)}"))
        else:
            yield from ((place, row) for row in rows)
