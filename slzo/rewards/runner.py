"""Rewards of answers: several functions with weights, and what is made of one that fails."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slzo.rewards.calls import Answers, RewardFailure, Wanted, call, find_function
from slzo.rewards.process import RewardProcess
from slzo.rewards.registry import REWARDS, check_package
from slzo.utils.errors import SlzoError

_log = logging.getLogger(__name__)

Functions = str | list[str | dict[str, Any]]
"""Reward functions as they stand in a config: a name, or a list of names and of mappings with function, weight and arguments."""


@dataclass(frozen=True)
class Rewarded:
    """Rewards of some answers.

    Attributes:
        totals: Weighted sum of each answer; not a number where a function failed.
        parts: The same of each function, by its short name, without weights.
        problems: What failed, a line each.
    """

    totals: tuple[float, ...]
    parts: Mapping[str, tuple[float, ...]]
    problems: tuple[str, ...] = ()


class Rewards:
    """Calls reward functions on answers.

    Args:
        functions: See :data:`Functions`.
        timeout: Seconds that a call may take, > 0.
        in_process: Call them in this process: no limit of time then, and one that ends the process ends the run.

    Raises:
        SlzoError: An argument is wrong.
    """

    def __init__(self, functions: Functions, timeout: float = 60.0, in_process: bool = False) -> None:
        self.functions = read_functions(functions)
        if not 0 < timeout < math.inf:
            raise SlzoError(f"data.objective.timeout {timeout}: must be a number of seconds above 0")
        self.timeout = timeout
        self.in_process = in_process
        self.names = _short_names([one.function for one in self.functions])
        self._process = None if in_process else RewardProcess(self.functions, timeout)

    @property
    def best(self) -> float:
        """The largest reward, if each function goes from 0 to 1."""
        return sum(max(one.weight, 0.0) for one in self.functions)

    def load(self) -> None:
        """Find the functions.

        Raises:
            SlzoError: One is not found.
        """
        if self._process is not None:
            self._process.load()
            return
        for one in self.functions:
            try:
                find_function(one.function)
            except LookupError as error:
                raise SlzoError(f"data.reward {one.function!r}: {error}") from error

    def __call__(self, answers: Answers, all_or_none: bool = False) -> Rewarded:
        """Reward answers.

        An answer at which a function fails is left out, and the others are tried once more; if that fails too, they are left out.
        ``all_or_none``: they are not tried again. Each failure is told on standard error, in a line.
        """
        places = list(range(len(answers.ids)))
        values = [[math.nan] * len(places) for _ in self.functions]
        problems: list[str] = []
        for _ in range(1 if all_or_none else 2):
            if not places:
                break
            part = answers.some(places)
            try:
                found = self._call(part)
            except RewardFailure as failure:
                place = failure.place if failure.place is not None else self._search(part)
                problems.append(_told(failure, part, place))
                _log.warning("%s; %s", problems[-1], "the step is not taken" if all_or_none else "it does not count")
                if place is None:
                    break
                del places[place]
                continue
            for own, new in zip(values, found, strict=True):
                for place, value in zip(places, new, strict=True):
                    own[place] = value
            break
        totals = [
            sum(w.weight * v for w, v in zip(self.functions, row, strict=True)) for row in zip(*values, strict=True)
        ]
        parts = {name: tuple(own) for name, own in zip(self.names, values, strict=True)}
        return Rewarded(tuple(totals), parts, tuple(problems))

    def _call(self, answers: Answers) -> list[list[float]]:
        if self._process is not None:
            return self._process(answers)
        return [call(one, find_function(one.function), answers) for one in self.functions]

    def _search(self, answers: Answers) -> int | None:
        """The first answer that fails when it is rewarded alone; ``None`` where none does, or looking took too long."""
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


def read_functions(given: object) -> tuple[Wanted, ...]:
    """The functions in a config.

    Raises:
        SlzoError: It is something else.
    """
    entries = [given] if isinstance(given, str | Mapping) else given
    if not isinstance(entries, Sequence) or not entries:
        raise SlzoError(f"data.reward {given!r}: name a function, or a list of them")
    found = [_read(entry) for entry in entries]
    for one in found:
        path, separator, _ = one.function.rpartition(":")
        if not one.function.strip() or (not separator and "." not in one.function and one.function not in REWARDS):
            raise SlzoError(
                f"data.reward {one.function!r}: no such reward; choose one of {', '.join(sorted(REWARDS))}, or give "
                "package.module.function or file.py:function"
            )
        if separator and not path.endswith(".py") and "/" in path:
            raise SlzoError(f"data.reward {one.function!r}: the file must end in .py")
        check_package(one.function)
    return tuple(found)


def _read(entry: object) -> Wanted:
    if isinstance(entry, str):
        return Wanted(entry)
    known = ("function", "weight", "arguments")
    if not isinstance(entry, Mapping) or not isinstance(entry.get("function"), str) or set(entry) - set(known):
        raise SlzoError(f"data.reward {entry!r}: give a name, or a mapping with {', '.join(known)}")
    weight, arguments = entry.get("weight", 1.0), entry.get("arguments") or {}
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise SlzoError(f"data.reward {entry['function']!r}: weight {weight!r} must be a number")
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise SlzoError(
            f"data.reward {entry['function']!r}: arguments {arguments!r} must be a mapping of names to values"
        )
    return Wanted(entry["function"], float(weight), dict(arguments))


def _short_names(names: Sequence[str]) -> tuple[str, ...]:
    short = [name.rpartition(":" if ":" in name else ".")[2] for name in names]
    return tuple(name if short.index(name) == place else f"{name}_{place}" for place, name in enumerate(short))


def _told(failure: RewardFailure, answers: Answers, place: int | None) -> str:
    if place is not None:
        where = f"at row {answers.ids[place]!r}"
    else:
        where = f"at {len(answers.ids)} rows together, the first is {answers.ids[0]!r}"
    return f"data.reward {failure.function}: {failure.reason}, {where}"
