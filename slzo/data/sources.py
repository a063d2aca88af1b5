"""Load a task's rows from the user's files, a folder, a package or the Hugging Face Hub."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from slzo.data.files import READERS, OnBadRow, PlacedRow, read_file, refuse, refuse_all
from slzo.data.hub import read_hub
from slzo.data.superglue import FOLDERS, hub_rows
from slzo.tasks.base import Example, HubSource, Split, Task, example_of
from slzo.tasks.fields import Fields
from slzo.utils.errors import RowError, SlzoError, shown
from slzo.utils.hub import split_revision

FILE_STEMS: Mapping[Split, tuple[str, ...]] = {"train": ("train",), "dev": ("dev",), "test": ("validation", "val")}
"""File names in a data folder, without extension. Test rows come from the validation split, as in MeZO."""

_IDX_PARTS = ("paragraph", "passage", "question", "query", "answer")
_NUMBERS = re.compile(r"-?\d+(-\d+)*")


def load_examples(
    task: Task,
    split: Split,
    *,
    data_dir: str | None = None,
    hub_path: str | None = None,
    hub_config: str | None = None,
    columns: bool = False,
    left_out: list[RowError] | None = None,
    file: str | None = None,
    loaded: list[HubSource] | None = None,
) -> list[Example]:
    """Load all examples of a split, in the order of the file, from the first source that applies.

    The sources in this order are a custom task's own file, ``data_dir``, the rows that come with the task, and the Hub.

    Args:
        task: The task.
        split: ``"train"``, ``"test"`` (the Hub's validation split), or ``"dev"`` for a task with a dev file.
        data_dir: Folder with ``<task>/{train,validation}.{jsonl,parquet,csv}``, the official SuperGLUE download, or
            the task's own folder in one of these forms.
        hub_path: Hub repository with the same fields that replaces the task's own, with ``@REVISION`` if it is not the newest
            commit.
        hub_config: Configuration of the Hub repository; by default the task's own, or none in another repository.
        columns: Keep the fields of each row in :attr:`Example.columns`.
        left_out: List to collect the errors of rows that are left out; ``None`` to raise the first error.
        file: File with rows to predict instead of any of these sources; they need no labels.
        loaded: List to which a data set of the Hub is added, with the commit that was loaded as its revision.

    Raises:
        SlzoError: If the source is missing, broken or empty, a field is missing or has the wrong type, a label does not match
            the candidates, a prompt or candidate is empty, or two rows have the same id.
    """
    on_bad = refuse if left_out is None else left_out.append
    if file is None:
        origin, placed = _open(task, split, on_bad, data_dir, hub_path, hub_config, [] if loaded is None else loaded)
    else:
        origin, placed = file, _rows_to_predict(task, _existing(file, "data.predict_file"), on_bad)
    examples: list[Example] = []
    places: dict[str, str] = {}
    for place, values in placed:
        position = len(examples) + len(left_out or ())  # bad rows count, so that other ids stay the same
        try:
            example = _example(task, split, values, position)
            if example.id in places:
                raise ValueError(f"id {example.id!r} is also the id of {places[example.id]}; give each row its own id")
        except ValueError as error:
            on_bad(RowError(f"{place}: {error}"))
            continue
        places[example.id] = place
        examples.append(replace(example, place=place, columns=values if columns else {}))
    if not examples and left_out:
        refuse_all(left_out, origin)
    if not examples:
        raise SlzoError(f"{origin}: holds no rows; task {task.name!r} needs at least one")
    return examples


def _example(task: Task, split: Split, values: Fields, position: int) -> Example:
    """Turn a row into an example; raise ValueError with the reason if it cannot be used."""
    missing = [field for field in task.fields if values.get(field) is None]
    if missing:
        present = ", ".join(str(name) for name, value in values.items() if value is not None)
        wanted = ", ".join(task.fields)
        raise ValueError(
            f"field {missing[0]!r} is missing; task {task.name!r} needs it (in all: {wanted}), and the row has {present}"
        )
    for field in task.fields:
        if _is_nan(values[field]):
            raise ValueError(f"field {field!r} is nan, as pandas writes a missing value; fill it, or leave the row out")
    example = example_of(task, values, row_id(values, position, split, task.id_field))
    if not example.prompt.strip():
        raise ValueError("the prompt is empty; give its fields some text")
    for candidate in example.candidates:
        if not candidate.strip():
            raise ValueError(f"candidate {candidate!r} is empty; give it some text")
    return example


def row_id(values: Fields, position: int, split: Split, field: str | None = None) -> str:
    """Return the id of a row: its ``id``, ``query_id`` or ``idx`` (MultiRC: ``paragraph-question-answer``), else its position.

    Numbers start from 0 in every split, so numeric ids of training rows get the prefix ``train-`` (dev rows: ``dev-``) to stay
    unique. If the user named a ``field``, its value is the id.

    Raises:
        ValueError: If the id is neither text nor a whole number.
    """
    known = ("id", "query_id", "idx") if field is None else (field,)
    name = next((name for name in known if values.get(name) is not None), None)
    value = position if name is None else values[name]
    if field is not None and isinstance(value, float) and value.is_integer():  # Parquet files made with pandas
        value = int(value)
    parts = [value[part] for part in _IDX_PARTS if part in value] if isinstance(value, Mapping) else [value]
    if not parts or not all(
        isinstance(part, str | int) and not isinstance(part, bool) and part != "" for part in parts
    ):
        raise ValueError(f"field {name!r} is {shown(value)}; an id must be text or a whole number")
    id = "-".join(map(str, parts))
    return f"{split}-{id}" if field is None and split != "test" and _NUMBERS.fullmatch(id) else id


def _open(
    task: Task,
    split: Split,
    on_bad: OnBadRow,
    data_dir: str | None,
    hub_path: str | None,
    hub_config: str | None,
    loaded: list[HubSource],
) -> tuple[str, Iterable[PlacedRow]]:
    """Return the name of the source, for messages, and its rows."""
    if split in task.files:
        path = _existing(task.files[split], f"data.task.{split}_file")
        return str(path), read_file(path, on_bad)
    if data_dir is not None:
        path = _find_file(task, split, Path(data_dir).expanduser())
        return str(path), _hub_fields(task, read_file(path, on_bad), on_bad)
    if hub_path is None:
        shipped = task.shipped_rows(split)
        if shipped is not None:
            origin = f"the rows of {task.name!r}"
            return origin, ((f"{origin}, row {number}", row) for number, row in enumerate(shipped, start=1))
    source, (other, revision) = task.hub, split_revision(hub_path or "")
    if other and (source is None or other != source.path):
        source = HubSource(other)  # another data set has other configurations
    if source is None:
        raise SlzoError(f"data.task.{split}_file None: task {task.name!r} has no {split} rows; give a file")
    source = replace(source, config=source.config if hub_config is None else hub_config, revision=revision)
    origin, rows, commit = read_hub(source, split, f"data.task {task.name!r}")
    loaded.append(replace(source, revision=commit))
    return origin, ((f"{origin} row {number}", row) for number, row in enumerate(rows, start=1))


def _existing(file: str, option: str) -> Path:
    """Return the path of a file; raise SlzoError if there is none."""
    path = Path(file).expanduser()
    if not path.is_file():
        reason = "is a folder; give a file" if path.is_dir() else "no such file; give an existing one"
        raise SlzoError(f"{option} {str(path)!r}: {reason}")
    return path


def _rows_to_predict(task: Task, path: Path, on_bad: OnBadRow) -> Iterator[PlacedRow]:
    """Yield the rows of a file; missing labels become those of a row without a label."""
    placed = ((place, {**values, **_missing_labels(task, values)}) for place, values in read_file(path, on_bad))
    return _hub_fields(task, placed, on_bad)


def _missing_labels(task: Task, values: Fields) -> dict[str, Any]:
    return {
        name: none
        for name, none in task.no_label.items()
        if values.get(name) in (None, "") or _is_nan(values.get(name))
    }


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


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


def _hub_fields(task: Task, placed: Iterable[PlacedRow], on_bad: OnBadRow) -> Iterator[PlacedRow]:
    for place, values in placed:
        try:
            rows = list(hub_rows(task.name, values))
        except ValueError as error:
            on_bad(RowError(f"{place}: {error}"))
        else:
            yield from ((place, row) for row in rows)
