"""Find reward functions by name and call them, in the worker process or in this one."""

import importlib
import importlib.util
import inspect
import math
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slzo.rewards.registry import REWARDS, RewardFunction
from slzo.utils.class_paths import format_error, format_place, raised, required_arguments
from slzo.utils.errors import Interrupted, short_repr
from slzo.utils.files import expanded

MAX_REWARD = 1e30
"""The largest weighted reward; sums of these still fit into float32."""


@dataclass(frozen=True)
class RewardSpec:
    """One reward function of a config, or one that was given in Python.

    Attributes:
        function: Name of a built-in function, import path (``package.module.function``), or ``file.py:function``; for a given
            function, its module and name.
        weight: Weight of its value in the sum.
        arguments: Arguments in addition to prompts, completions and columns.
        given: The function itself, if it was given in Python.
    """

    function: str
    weight: float
    arguments: Mapping[str, Any]
    given: RewardFunction | None

    def settings(self) -> dict[str, Any]:
        """Return the entry of a config that names the function."""
        return {"function": self.function, "weight": self.weight, "arguments": dict(self.arguments)}


@dataclass(frozen=True)
class AnswerBatch:
    """The answers to reward, with their rows; all lists have the same length.

    Attributes:
        ids: Ids of the rows.
        prompts: Texts, or lists of messages if the rows are conversations.
        completions: Texts, or lists of one message.
        columns: Fields of the rows.
    """

    ids: Sequence[str]
    prompts: Sequence[Any]
    completions: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]

    def some(self, places: Sequence[int]) -> "AnswerBatch":
        """Return the answers at some indices."""

        def select(values: Sequence[Any]) -> list[Any]:
            return [values[place] for place in places]

        columns = {name: select(values) for name, values in self.columns.items()}
        return AnswerBatch(select(self.ids), select(self.prompts), select(self.completions), columns)


class RewardFailure(Exception):  # noqa: N818 - sent from another process, and reported as a SlzoError
    """A function cannot be loaded, or did not return a number for each answer.

    Attributes:
        function: Name of the function.
        reason: What is wrong, or what it did as a phrase that begins with a verb.
        place: Index of the answer at which it failed; ``None`` if unknown.
        timed_out: Whether it took too long.
    """

    def __init__(self, function: str, reason: str, place: int | None = None, timed_out: bool = False) -> None:
        super().__init__(function, reason, place, timed_out)
        self.function, self.reason, self.place, self.timed_out = function, reason, place, timed_out


def split_name(name: str) -> tuple[str, str]:
    """Return the file or module of a function that is not built in, and its name there; one is empty in a wrong name."""
    where, _, attribute = name.rpartition(":" if ":" in name else ".")
    return where, attribute


def code_file(name: str) -> Path | None:
    """Return the file of a function; ``None`` if it is built in or has none."""
    if name in REWARDS:
        return None
    where, _ = split_name(name)
    if where.endswith(".py"):
        return expanded(where)
    found = importlib.util.find_spec(where)
    return None if found is None or not found.has_location else Path(str(found.origin))


def load_function(spec: RewardSpec) -> RewardFunction:
    """Find a reward function, and check that it takes the arguments of the config.

    A function may have an attribute ``check``, a function of the arguments that raises ValueError.

    Raises:
        RewardFailure: There is no such function, it does not take them, or its file cannot be run.
    """
    function = _find(spec.function) if spec.given is None else spec.given
    if inspect.iscoroutinefunction(function):
        raise RewardFailure(
            spec.function, "is asynchronous, which is not supported; call asyncio.run in a plain function"
        )
    accepted = _accepted(function, spec.arguments)
    if unknown := [name for name in spec.arguments if name not in accepted]:
        reason = f"takes no argument {unknown[0]!r}; choose from {', '.join(sorted(accepted))}"
        raise RewardFailure(spec.function, reason)
    if (check := getattr(function, "check", None)) is not None:
        try:
            check(spec.arguments)
        except ValueError as error:
            raise RewardFailure(spec.function, str(error)) from None
        except Exception as error:  # the user's function may raise anything
            raise RewardFailure(spec.function, f"its check {raised(error)}") from error
    return function


def _find(name: str) -> RewardFunction:
    if name in REWARDS:
        return REWARDS[name]
    where, attribute = split_name(name)
    try:
        module = _run_file(expanded(where)) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        reason = f"{where} cannot be imported ({format_error(error)}){format_place(error)}"
        raise RewardFailure(name, reason) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RewardFailure(name, f"{where} has no function {attribute}")
    return function


def call(spec: RewardSpec, function: RewardFunction, answers: AnswerBatch) -> list[float]:
    """Call a reward function; return one number per answer, NaN where it returned ``None``.

    Raises:
        RewardFailure: The function raised, or returned something else.
        Interrupted: The function raised KeyboardInterrupt.
    """
    given = {"prompts": answers.prompts, "completions": answers.completions, **answers.columns, **spec.arguments}
    accepted = _accepted(function, given)
    try:
        returned: Any = function(**{name: value for name, value in given.items() if name in accepted})
        is_list = isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Mapping | set)
        values = list(returned) if is_list else None
    except KeyboardInterrupt as error:
        raise Interrupted(signal.SIGINT) from error
    except Exception as error:  # the user's function may raise anything
        raise RewardFailure(spec.function, raised(error)) from error
    if values is None:
        raise RewardFailure(
            spec.function, f"returned {short_repr(returned)}; return a list with a number for each answer"
        )
    if len(values) != len(answers.ids):
        raise RewardFailure(
            spec.function,
            f"returned a list of length {len(values)} instead of one number for each of {len(answers.ids)} answers",
        )
    numbers = []
    for place, value in enumerate(values):
        if value is None:
            numbers.append(math.nan)
            continue
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise RewardFailure(spec.function, f"returned {str(value)[:60]!r}, which is not a number", place) from None
        if not math.isfinite(number):
            raise RewardFailure(spec.function, f"returned {number}", place)
        if abs(number) * max(1.0, abs(spec.weight)) > MAX_REWARD:
            reason = f"returned {number:g}, which is above {MAX_REWARD:g} (with its weight {spec.weight:g})"
            raise RewardFailure(spec.function, reason, place)
        numbers.append(number)
    return numbers


def required_columns(spec: RewardSpec, function: RewardFunction) -> tuple[str, ...]:
    """Return the names of a function's arguments that fields of the rows must supply: those without a default."""
    given = {"prompts", "completions", *spec.arguments}
    try:
        return tuple(name for name in required_arguments(function) if name not in given)
    except (TypeError, ValueError):  # some functions in C have no signature
        return ()


def _accepted(function: RewardFunction, given: Mapping[str, Any]) -> set[str]:
    """Return the names of arguments that a function takes; all of them if it has ``**columns``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set(given)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return set(given)
    return {parameter.name for parameter in parameters}


def _run_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    path = path.resolve()
    name = f"slzo_reward_{abs(hash((path, path.read_bytes())))}"
    if name in sys.modules:  # functions of one file share its module, until the file is edited
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that it can import its neighbours, as a script can
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
