"""Checks the types and ranges of arguments, and the signatures of methods in users' classes."""

import inspect
from collections.abc import Mapping
from typing import Any, get_args

from slzo.utils.errors import SlzoError, short_repr

ArgumentTypes = Mapping[str, tuple[Any, str]]
"""The type of each argument, as for ``isinstance``, and what to give, in words."""


def check_integer(option: str, value: object) -> None:
    """Check that a value is a whole number, which only Python code may not have given; ``None`` is not checked.

    Raises:
        SlzoError: It is something else; ``True`` and ``False`` are not numbers.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise SlzoError(f"{option} {short_repr(value)}: is a {type(value).__name__}; give a whole number")


def check_at_least(option: str, value: int | None, least: int = 1, advice: str = "") -> None:
    """Check that a value is a whole number and not too small; ``None`` is not checked.

    Raises:
        SlzoError: It is not; for a number that is too small, ``advice`` ends the message.
    """
    check_integer(option, value)
    if value is not None and value < least:
        raise SlzoError(f"{option} {value}: must be at least {least}{advice and '; '}{advice}")


def check_choice(option: str, value: object, choices: Any) -> None:
    """Check that a value is one of those of a ``Literal``.

    Raises:
        SlzoError: It is not.
    """
    if value not in get_args(choices):
        raise SlzoError(f"{option} {value!r}: choose one of {', '.join(get_args(choices))}")


def check_types(prefix: str, types: ArgumentTypes, given: Mapping[str, Any]) -> None:
    """Check the types of arguments, of a group called ``prefix``; ``True`` and ``False`` are not numbers.

    Raises:
        SlzoError: An argument has another type.
    """
    for name, (kind, wanted) in types.items():
        value = given[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in (kind, *get_args(kind))):
            raise SlzoError(f"{prefix}.{name} {short_repr(value)}: is a {type(value).__name__}; give {wanted}")


class ChecksOverrides:
    """Refuses a subclass with a method that cannot be called as the package calls it, when the class is defined."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("slzo.")]
        for name, own in vars(cls).items():
            base = next((vars(each)[name] for each in bases if name in vars(each)), None)
            if name.startswith("_") or not (inspect.isfunction(own) and inspect.isfunction(base)):
                continue
            wanted = [each.name for each in inspect.signature(base).parameters.values() if each.default is each.empty]
            signature = inspect.signature(own, follow_wrapped=False)  # a decorator may change the arguments
            try:
                signature.bind(*wanted)
            except TypeError:
                arguments = ", ".join(wanted)
                raise TypeError(
                    f"{cls.__qualname__}.{name}{signature}: slzo calls {name}({arguments}); give the method these arguments"
                ) from None
