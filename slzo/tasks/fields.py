"""Read single fields of a row; errors name the field and its value."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from slzo.utils.errors import short_repr

Fields = Mapping[str, Any]
"""The fields of a row by name, as the Hub calls them."""


class NamedLabel(int):
    """A label of a ``ClassLabel`` feature of datasets: a number with a name.

    Attributes:
        names: The names of all numbers of the feature.
    """

    names: tuple[str, ...]

    def __new__(cls, value: int, names: tuple[str, ...]) -> Self:
        label = super().__new__(cls, value)
        label.names = names
        return label

    def __getnewargs__(self) -> tuple[int, tuple[str, ...]]:  # type: ignore[override]
        return int(self), self.names

    @property
    def name(self) -> str:
        """The name of this number."""
        return self.names[self]


def label_names(features: object) -> dict[str, tuple[str, ...]]:
    """Return the names of labels by field, from the ``features`` of a data set, as objects of datasets or as dictionaries."""
    if not isinstance(features, Mapping):
        return {}
    found = {
        field: feature.get("names") if isinstance(feature, Mapping) else getattr(feature, "names", None)
        for field, feature in features.items()
    }
    return {field: tuple(map(str, names)) for field, names in found.items() if isinstance(names, list)}


def with_names(row: Fields, names: Mapping[str, tuple[str, ...]]) -> Fields:
    """Return a row whose numbers have their names; a number without a name, such as -1 for no label, stays as it is."""
    named = {
        field: NamedLabel(row[field], known)
        for field, known in names.items()
        if type(row.get(field)) is int and 0 <= row[field] < len(known)
    }
    return {**row, **named} if named else row


def is_missing(value: object) -> bool:
    """Whether a field has no value: ``None``, an empty cell, or the NaN that pandas writes for one."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def check_characters(text: str) -> None:
    """Raise ValueError if a text has half of a surrogate pair, which tokenizers and files do not take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair; write complete characters") from None


def text_field(row: Fields, name: str, allow_empty: bool = False) -> str:
    """Read a text field.

    Raises:
        ValueError: The field is missing or not text, or is only white space without ``allow_empty``.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {short_repr(value)}; it must be text")
    if not value.strip() and not allow_empty:
        raise ValueError(f"field {name!r} is empty; it must hold some text")
    return value


def texts_field(row: Fields, name: str, key: str | None = None) -> tuple[str, ...]:
    """Read a field with a list of texts, or with an object that has such a list under ``key``.

    Raises:
        ValueError: There is no such list, or one of the texts is only white space.
    """
    value = row.get(name)
    where = repr(name)
    if key is not None:
        where = f"{name!r}[{key!r}]"
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"field {where} is {short_repr(value)}; it must be a list of texts")
    if not all(text.strip() for text in value):
        raise ValueError(f"field {where} is {short_repr(list(value))}; an answer must not be empty")
    return tuple(value)


def label_field(row: Fields, num_labels: int) -> tuple[int, ...]:
    """Read the field ``label``, a gold index, as a tuple of one; empty for the Hub's -1, which marks a row without a label.

    Raises:
        ValueError: The label is not an integer between -1 and ``num_labels`` - 1.
    """
    value = row.get("label")
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < num_labels:
        allowed = ", ".join(map(str, range(num_labels)))
        raise ValueError(
            f"field 'label' is {short_repr(value)}; it must be one of the numbers {allowed} (-1: no label)"
        )
    return () if value == -1 else (value,)
