"""Insert lists of registered names into docstrings."""

from collections.abc import Callable, Iterable
from typing import TypeVar

_Documented = TypeVar("_Documented", bound=Callable)


def with_lists(**lists: Iterable[str]) -> Callable[[_Documented], _Documented]:
    """Return a decorator that replaces ``{NAME}`` in the docstring, from which help texts are made, with names."""

    def fill(documented: _Documented) -> _Documented:
        text = documented.__doc__ or ""
        for name, names in lists.items():
            text = text.replace(f"{{{name}}}", ", ".join(names))
        documented.__doc__ = text
        return documented

    return fill


def class_names(kinds: Iterable[type]) -> list[str]:
    """Return the names of registered classes."""
    return [kind.__name__ for kind in kinds]
