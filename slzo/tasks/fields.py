"""Reading one field of a row, with errors that name the field and the value."""

from collections.abc import Mapping, Sequence
from typing import Any

Fields = Mapping[str, Any]
"""The fields of a row by name, as the Hub calls them."""


def shown(value: object) -> str:
    """Repr of a value, cut to what fits in a one-line message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def text_field(row: Fields, name: str, allow_empty: bool = False) -> str:
    """A field that must hold text.

    Raises:
        ValueError: The field is missing, not text, or only white space unless ``allow_empty``.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {shown(value)}; it must be text")
    if not value.strip() and not allow_empty:
        raise ValueError(f"field {name!r} is empty; it must hold some text")
    return value


def texts_field(row: Fields, name: str, key: str | None = None) -> tuple[str, ...]:
    """A field that must hold a list of texts, or an object whose ``key`` holds one.

    Raises:
        ValueError: It does not, or one of the texts is only white space.
    """
    value = row.get(name)
    where = repr(name)
    if key is not None:
        where = f"{name!r}[{key!r}]"
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"field {where} is {shown(value)}; it must be a list of texts")
    if not all(text.strip() for text in value):
        raise ValueError(f"field {where} is {shown(list(value))}; an answer must not be empty")
    return tuple(value)


def label_field(row: Fields, num_labels: int, name: str = "label") -> tuple[int, ...]:
    """The gold index of a row, as a tuple of one; empty for the Hub's -1, which marks a row without a label.

    Raises:
        ValueError: The label is not an integer or lies outside -1 .. ``num_labels`` - 1.
    """
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < num_labels:
        allowed = ", ".join(map(str, range(num_labels)))
        raise ValueError(f"field {name!r} is {shown(value)}; it must be one of the numbers {allowed} (-1: no label)")
    return () if value == -1 else (value,)
