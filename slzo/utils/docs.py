"""Lists in docstrings, made from registries."""

from collections.abc import Callable, Iterable
from typing import TypeVar

_Kind = TypeVar("_Kind", bound=type)


def with_lists(**lists: Iterable[str]) -> Callable[[_Kind], _Kind]:
    """Put names in the place of ``{NAME}`` in the docstring of a class; help and pages are made from it."""

    def fill(kind: _Kind) -> _Kind:
        text = kind.__doc__ or ""
        for name, names in lists.items():
            text = text.replace(f"{{{name}}}", ", ".join(names))
        kind.__doc__ = text
        return kind

    return fill


def class_names(kinds: Iterable[type]) -> list[str]:
    """Names of registered classes."""
    return [kind.__name__ for kind in kinds]
