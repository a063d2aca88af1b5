"""Plans how many steps and validations fit into the time of a run, from measured times."""

import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Self

from slzo.utils.duration import duration
from slzo.utils.pluralize import pluralize

_MOST_VALIDATIONS = 8
# Validations that are added to the given ones take at most this share of the time.
_VALIDATIONS_SHARE = 0.25
# Share of the time that is planned; the rest is for checkpoints, logging and steps that are slower than the measured ones.
_USED = 0.9


@dataclass(frozen=True)
class Passes:
    """How often all rows of a split are scored besides validations.

    Attributes:
        dev_before: Dev rows, before the first step.
        test_before: Held-out rows, before the first step.
        test_after: Held-out rows, after the last step.
    """

    dev_before: int = 0
    test_before: int = 0
    test_after: int = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class TimeBudget:
    """Time limit of a run, and its other limits.

    Attributes:
        seconds: The whole time.
        ends: When it ends, on the clock of :func:`time.monotonic`.
        max_steps: Largest number of steps, with those already taken; -1 for no limit.
        done: Steps already taken, by the run that is continued.
        every: Steps between two validations; ``math.inf`` for the last validation only.
        every_seconds: Seconds of steps between two validations, instead of ``every``; ``None`` if it is given in steps.
        sets_interval: Whether the interval between validations can be changed.
        dev_batches: Batches of dev rows that a validation scores in this process; ``None`` for all.
        passes: Other scoring passes.
    """

    seconds: float
    ends: float
    max_steps: int = -1
    done: int = 0
    every: float = math.inf
    every_seconds: float | None = None
    sets_interval: bool = True
    dev_batches: int | None = None
    passes: Passes = field(default_factory=Passes)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()


@dataclass(frozen=True)
class RunTimes:
    """Measured times of the parts of a run, in seconds.

    Attributes:
        step: A step with rows whose states are cached.
        new_row: What a row adds to the first step that has it.
        new_rows: Number of training rows whose states are not cached yet.
        rows_per_step: Rows of a step, of this process.
        validation: A validation; 0 if there are none.
        before: Everything from the measurement to the first step.
        after: Everything after the last validation.
    """

    step: float
    new_row: float = 0.0
    new_rows: int = 0
    rows_per_step: int = 1
    validation: float = 0.0
    before: float = 0.0
    after: float = 0.0

    @classmethod
    def slowest(cls, times: Sequence[Self]) -> Self:
        """Return the largest of each time, over the processes of a run."""
        return cls(*map(max, zip(*map(astuple, times), strict=True)))

    def of_steps(self, number: int) -> float:
        """Return the time of the first ``number`` steps, without validations."""
        return number * self.step + min(number * self.rows_per_step, self.new_rows) * self.new_row


@dataclass(frozen=True)
class TimePlan:
    """Steps and validations of a run.

    Attributes:
        steps: Steps of the run, with those already taken; only these if no further step fits.
        new_steps: Steps that are still to be taken.
        every: Steps between two validations; ``None`` to keep the given interval.
        validations: Number of validations.
        seconds: Expected time from now to the end.
        least: Shortest total time that fits one step and one validation, in seconds.
        times: The times that the plan is made from.
    """

    steps: int
    new_steps: int
    every: int | None
    validations: int
    seconds: float
    least: float
    times: RunTimes

    @classmethod
    def of(cls, times: RunTimes, budget: TimeBudget, left: float) -> Self:
        """Plan the most steps that fit into ``left`` seconds.

        If all of ``budget.max_steps`` fit, the interval between validations stays. Otherwise it is lowered so that there are 8
        validations, or as many as take a quarter of the time; at least one, after the last step.
        """
        usable = _USED * left - times.before - times.after
        most = math.inf if budget.max_steps < 0 else max(0, budget.max_steps - budget.done)
        given = budget.every if budget.every_seconds is None else max(1, round(budget.every_seconds / times.step))
        wanted = 1

        def validations(steps: int) -> int:
            return 0 if times.validation <= 0 else max(min(wanted, steps), math.ceil(steps / given))

        def needed(steps: int) -> float:
            return times.of_steps(steps) + validations(steps) * times.validation

        def fitting() -> int:
            largest = int(min(most, max(0.0, usable) / times.step))
            return bisect_right(range(1, largest + 1), usable, key=needed)

        steps = fitting()
        every: int | None = None
        if steps < most and budget.sets_interval:
            wanted = max(1, min(_MOST_VALIDATIONS, int(_VALIDATIONS_SHARE * left / max(times.validation, 1e-9))))
            steps = fitting()
            every = max(1, int(min(given, math.ceil(steps / wanted))))
        elif budget.sets_interval and budget.every_seconds is not None:
            every = int(given)
        number = validations(steps) if every is None or times.validation <= 0 else math.ceil(steps / every)
        around = times.before + times.after
        least = budget.seconds - left + (around + times.of_steps(1) + times.validation) / _USED
        total = around + times.of_steps(steps) + number * times.validation
        return cls(budget.done + steps, steps, every, number, total, least, times)

    def describe(self, budget: TimeBudget) -> str:
        """Describe the plan in one line."""
        times = self.times
        passes = budget.passes
        number = self.validations
        mean = times.of_steps(self.new_steps) / max(1, self.new_steps)  # steps with new rows take longer
        parts = [f"{self.new_steps:,} step{'s' * (self.new_steps != 1)} of {mean:.2g} s"]
        if number:
            often = "after each step" if self.every == 1 else f"one every {self.every} steps"
            every = f", {often}" if number > 1 and self.every is not None else ""
            parts.append(f"{pluralize(number, 'validation')} of {times.validation:.2g} s{every}")
        if passes.test_before + passes.test_after:
            parts.append(f"other scores {times.before + times.after:.2g} s")
        return (
            f"Plan       {', '.join(parts)}: about {duration(self.seconds)} of {duration(max(0.0, budget.left))} left"
        )
