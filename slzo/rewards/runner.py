"""Reward answers with several weighted functions, and handle their failures."""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from slzo.rewards.calls import (
    MAX_REWARD,
    AnswerBatch,
    RewardFailure,
    RewardSpec,
    call,
    code_file,
    load_function,
    required_columns,
    split_name,
)
from slzo.rewards.process import RewardProcess
from slzo.rewards.registry import REWARDS, RewardFunction, check_package
from slzo.utils.console import print_status
from slzo.utils.errors import SlzoError

# Answers of a batch at which a function may fail, before all are left out.
_MOST_LEFT_OUT = 3

# With Any alone the command line would read texts such as "001" and "[A-Z]" as a number and a list.
_Mapping = dict[str, str | Any]
RewardOption = str | _Mapping | list[str | _Mapping | Callable] | Callable
"""Reward functions: a name, a function, a mapping with function, weight and arguments, or a list of these."""


@dataclass(frozen=True)
class RewardedAnswers:
    """Rewards of some answers.

    Attributes:
        totals: Weighted sum of each answer; NaN if a function failed.
        parts: Values of each function without weights, by its short name; NaN if it returned ``None`` or failed.
        problems: Messages about failures, one line each.
    """

    totals: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]
    problems: tuple[str, ...]


class RewardRunner:
    """Calls reward functions on answers.

    Args:
        functions: See :data:`RewardOption`.
        timeout: Time limit of a call, in seconds, > 0.
        in_process: Call the functions in this process: without a time limit, and a function that exits ends the run. All of them
            are called in this process if one is given as such, not by name.

    Raises:
        SlzoError: An argument is invalid.
    """

    def __init__(self, functions: RewardOption, timeout: float = 60.0, in_process: bool = False) -> None:
        self.functions = read_functions(functions)
        if not 0 < timeout < math.inf:
            raise SlzoError(f"data.objective.timeout {timeout}: must be a number of seconds above 0")
        self.timeout = timeout
        self.names = _short_names([one.function for one in self.functions])
        in_process = in_process or self.has_given
        self._caller = _ThisProcess(self.functions) if in_process else RewardProcess(self.functions, timeout)

    @property
    def has_given(self) -> bool:
        """Whether one of the functions was given as such, not by name."""
        return any(one.given is not None for one in self.functions)

    @property
    def best(self) -> float:
        """The largest possible reward if each function returns 0 to 1."""
        return sum(max(one.weight, 0.0) for one in self.functions)

    def code_hash(self) -> str:
        """Return a hash of the files of the functions that are not built in, as far as they are known by name."""
        digest = hashlib.sha256()
        for one in self.functions:
            file = None if one.given is not None else code_file(one.function)
            digest.update(b"" if file is None else file.read_bytes())
        return digest.hexdigest()[:12]

    def load(self) -> list[tuple[str, Sequence[str]]]:
        """Load the functions; return the name of each with the columns that it requires.

        Raises:
            SlzoError: A function cannot be found.
        """
        required = self._caller.load()
        return [(one.function, columns) for one, columns in zip(self.functions, required, strict=True)]

    def __call__(self, answers: AnswerBatch, all_or_none: bool = False) -> RewardedAnswers:
        """Reward answers. Where one of several functions returns ``None``, it adds nothing to the sum.

        If a function fails at an answer, that answer is left out and the others are tried again. All are left out if it fails at
        more than three, or at no answer alone, or takes too long; with ``all_or_none`` at the first failure. Each kind of failure
        is reported in one line, from every process.
        """
        places = list(range(len(answers.ids)))
        values = [[math.nan] * len(places) for _ in self.functions]
        totals = [math.nan] * len(places)
        failed: dict[str, list[str]] = {}  # the ids of the rows of each kind of failure
        outcome = ""
        while places:
            part = answers.some(places)
            try:
                found = self._call(part)
            except RewardFailure as failure:
                place = failure.place
                if place is None and not failure.timed_out:
                    place = self._search(part)
                what = f"data.reward {failure.function}: {failure.reason}"
                if place is None:
                    what += f", for {len(part.ids)} answers together, the first of which is to row {part.ids[0]!r}"
                failed.setdefault(what, []).extend([] if place is None else [part.ids[place]])
                if all_or_none or place is None or sum(map(len, failed.values())) > _MOST_LEFT_OUT:
                    outcome = "the step is not taken" if all_or_none else "no row of this batch is counted"
                    break
                del places[place]
            else:
                for place, *row in zip(places, *found, strict=True):
                    for of_function, value in zip(values, row, strict=True):
                        of_function[place] = value
                    weighted = zip(self.functions, row, strict=True)
                    totals[place] = sum(one.weight * value for one, value in weighted if not math.isnan(value))
                break
        problems = [what + _at_rows(ids) for what, ids in failed.items()]
        for problem, ids in zip(problems, failed.values(), strict=True):
            left_out = "the row is not counted" if len(ids) == 1 else "the rows are not counted"
            print_status(f"warning: {problem}; {outcome or left_out}")
        parts = {name: tuple(of_function) for name, of_function in zip(self.names, values, strict=True)}
        return RewardedAnswers(tuple(totals), parts, tuple(problems))

    def _call(self, answers: AnswerBatch) -> list[list[float]]:
        found = self._caller(answers)
        for place, values in enumerate(zip(*found, strict=True)):
            if all(map(math.isnan, values)):
                raise RewardFailure(", ".join(one.function for one in self.functions), "returned None", place)
        return found

    def _search(self, answers: AnswerBatch) -> int | None:
        """Return the index of the first answer that fails alone; ``None`` if none does or the search takes too long."""
        if len(answers.ids) == 1:
            return 0
        until = time.monotonic() + self.timeout
        for place in range(len(answers.ids)):
            if time.monotonic() > until:
                break
            try:
                self._call(answers.some([place]))
            except RewardFailure:
                return place
        return None


class _ThisProcess:
    """Calls reward functions in this process, as :class:`RewardProcess` does in another one."""

    def __init__(self, functions: Sequence[RewardSpec]) -> None:
        self._functions = functions

    def load(self) -> Sequence[tuple[str, ...]]:
        return [required_columns(*pair) for pair in self._loaded]

    def __call__(self, answers: AnswerBatch) -> list[list[float]]:
        # a function may change its lists
        return [call(*pair, copy.deepcopy(answers)) for pair in self._loaded]

    @cached_property
    def _loaded(self) -> list[tuple[RewardSpec, RewardFunction]]:
        try:
            return [(spec, load_function(spec)) for spec in self._functions]
        except RewardFailure as failure:
            raise SlzoError(f"data.reward {failure.function!r}: {failure.reason}") from failure


def read_functions(given: object) -> tuple[RewardSpec, ...]:
    """Read reward functions, see :data:`RewardOption`.

    Raises:
        SlzoError: The value is not of this form, or names an unknown function.
    """
    entries = [given] if isinstance(given, str | Mapping) or callable(given) else given
    if not isinstance(entries, Sequence) or not entries:
        raise SlzoError(
            f"data.reward {given!r}: name a function, as package.module.function or file.py:function, or a list of them; in "
            "Python it may also be the function itself"
        )
    return tuple(map(_read, entries))


def _read(given_entry: object) -> RewardSpec:
    entry = given_entry if isinstance(given_entry, Mapping) else {"function": given_entry}
    known, function = ("function", "weight", "arguments"), entry.get("function")
    is_function = callable(function) and not isinstance(function, type)
    if not (isinstance(function, str) or is_function) or set(entry) - set(known):
        raise SlzoError(
            f"data.reward {given_entry!r}: give a name, or a mapping with {', '.join(known)}; in Python also a function"
        )
    given: Any = None if isinstance(function, str) else function
    name = str(function) if given is None else _name_of(given)
    weight, arguments = entry.get("weight", 1.0), entry.get("arguments") or {}
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= MAX_REWARD:
        raise SlzoError(
            f"data.reward {name!r}: weight {weight!r} must be a number from -{MAX_REWARD:g} to {MAX_REWARD:g}"
        )
    if not isinstance(arguments, Mapping) or not all(isinstance(argument, str) for argument in arguments):
        raise SlzoError(f"data.reward {name!r}: arguments {arguments!r} must be a mapping of names to values")
    if given is not None:
        return RewardSpec(name, float(weight), dict(arguments), given)
    path, separator, _ = name.rpartition(":")
    if name not in REWARDS and not all(split_name(name)):
        raise SlzoError(
            f"data.reward {name!r}: no such reward; choose one of {', '.join(sorted(REWARDS))}, or give "
            "package.module.function or file.py:function"
        )
    if not separator and name.endswith(".py"):
        raise SlzoError(f"data.reward {name!r}: name the function too, as in {name}:function")
    if separator and not path.endswith(".py") and "/" in path:
        raise SlzoError(f"data.reward {name!r}: the file must end in .py")
    check_package(name)
    return RewardSpec(name, float(weight), dict(arguments), None)


def _name_of(function: Callable[..., Any]) -> str:
    """Return module and name of a function, also of a partial one, or those of the class of another callable object."""
    if isinstance(function, partial):
        return _name_of(function.func)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _short_names(names: Sequence[str]) -> tuple[str, ...]:
    short = [split_name(name)[1] for name in names]
    found: list[str] = []
    for place, name in enumerate(short):
        while name in (*found, "std") or name in short[:place]:  # reward_std is the standard deviation
            name = f"{name}_{place}"
        found.append(name)
    return tuple(found)


def _at_rows(ids: Sequence[str]) -> str:
    if not ids:
        return ""
    return f", at row{'' if len(ids) == 1 else 's'} {', '.join(map(repr, ids))}"
