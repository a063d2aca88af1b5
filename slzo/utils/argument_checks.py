"""Checks the types of arguments that are given in Python, and the signatures of methods in users' classes."""

import inspect
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
