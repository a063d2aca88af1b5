"""Insert lists of what is registered into docstrings."""

from collections.abc import Callable, Iterable
from typing import TypeVar

_Documented = TypeVar("_Documented", bound=Callable)


def with_lists(**lists: Iterable[str | type]) -> Callable[[_Documented], _Documented]:
    """Return a decorator that replaces ``{NAME}`` in the docstring, from which help texts are made, with texts or class names."""

    def fill(documented: _Documented) -> _Documented:
        text = documented.__doc__ or ""
        for name, items in lists.items():
            names = (each if isinstance(each, str) else each.__name__ for each in items)
            text = text.replace(f"{{{name}}}", ", ".join(names))
        documented.__doc__ = text
        return documented

    return fill
