"""Finding reward functions by name and calling them; what the worker process does, and this one if that is wanted."""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slzo.rewards.registry import REWARDS, RewardFunction
from slzo.utils.class_paths import format_error, format_place


@dataclass(frozen=True)
class Wanted:
    """One reward function.

    Attributes:
        function: Name of a built-in one, import path (``package.module.function``), or ``file.py:function``.
        weight: Of its value in the sum.
        arguments: Given to it beside prompts, completions and columns.
    """

    function: str
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """What is rewarded: all lists are of one length.

    Attributes:
        ids: Of the rows.
        prompts: Texts, or lists of messages where the rows are conversations.
        completions: Texts, or lists of one message.
        columns: The rows' fields.
    """

    ids: Sequence[str]
    prompts: Sequence[Any]
    completions: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]

    def some(self, places: Sequence[int]) -> "Answers":
        """Those at some places."""

        def taken(values: Sequence[Any]) -> list[Any]:
            return [values[place] for place in places]

        columns = {name: taken(values) for name, values in self.columns.items()}
        return Answers(taken(self.ids), taken(self.prompts), taken(self.completions), columns)


class RewardFailure(Exception):  # noqa: N818
    """A function did not give each answer a number.

    Attributes:
        function: Its name.
        reason: What it did, as a verb.
        place: The answer it did so at; ``None`` if that is not known.
    """

    def __init__(self, function: str, reason: str, place: int | None = None) -> None:
        super().__init__(function, reason, place)
        self.function, self.reason, self.place = function, reason, place


def find_function(name: str) -> RewardFunction:
    """The function of that name.

    Raises:
        LookupError: There is none, or its file cannot be run; one line.
    """
    if name in REWARDS:
        return REWARDS[name]
    where, separator, own = name.rpartition(":" if ":" in name else ".")
    if not separator or not where or not own:
        raise LookupError(
            f"no such reward; choose one of {', '.join(sorted(REWARDS))}, or give package.module.function or file.py:function"
        )
    try:
        module = _run_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # whatever the user's file raises
        raise LookupError(f"{where} cannot be imported ({format_error(error)}){format_place(error)}") from error
    function = getattr(module, own, None)
    if not callable(function):
        raise LookupError(f"{where} has no function {own}")
    return function


def call(wanted: Wanted, function: RewardFunction, answers: Answers) -> list[float]:
    """A number for each answer.

    Raises:
        RewardFailure: The function raised, or returned something else.
    """
    given = {"prompts": answers.prompts, "completions": answers.completions, **answers.columns, **wanted.arguments}
    given = {name: value for name, value in given.items() if name in _accepted(function, given)}
    try:
        found = function(**given)
        values = list(found)
    except Exception as error:  # whatever the user's function raises
        raise RewardFailure(
            wanted.function, f"raised {format_error(error)}", _place(function, wanted, answers)
        ) from error
    if len(values) != len(answers.ids):
        raise RewardFailure(wanted.function, f"returned {len(values)} values for {len(answers.ids)} answers", 0)
    numbers = []
    for place, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise RewardFailure(wanted.function, f"returned {str(value)[:60]!r}, no number", place) from None
        if not math.isfinite(number):
            raise RewardFailure(wanted.function, f"returned {number}", place)
        numbers.append(number)
    return numbers


def _accepted(function: RewardFunction, given: Mapping[str, Any]) -> set[str]:
    """Names of arguments that a function takes: all if it has ``**columns``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set(given)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return set(given)
    return {parameter.name for parameter in parameters}


def _place(function: RewardFunction, wanted: Wanted, answers: Answers) -> int | None:
    """The first answer that the function raises at when it is called with that one alone."""
    if len(answers.ids) == 1:
        return 0
    for place in range(len(answers.ids)):
        try:
            call(wanted, function, answers.some([place]))
        except RewardFailure:
            return place
    return None


def _run_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    name = f"slzo_reward_{abs(hash(str(path.resolve())))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
