"""Checks the types of arguments that are given in Python; on the command line the parser has done so."""

from collections.abc import Mapping
from typing import Any, get_args

from slzo.utils.errors import SlzoError, short_repr

ArgumentTypes = Mapping[str, tuple[Any, str]]
"""The type of each argument, as for ``isinstance``, and what to give, in words."""


def check_types(prefix: str, types: ArgumentTypes, given: Mapping[str, Any]) -> None:
    """Check the types of arguments, of a group called ``prefix``; ``True`` and ``False`` are not numbers.

    Raises:
        SlzoError: An argument has another type.
    """
    for name, (kind, wanted) in types.items():
        value = given[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in (kind, *get_args(kind))):
            raise SlzoError(f"{prefix}.{name} {short_repr(value)}: is a {type(value).__name__}; give {wanted}")
