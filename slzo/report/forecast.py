"""Estimate how long a run will take from its first steps."""

import math
import statistics
import time

from slzo.zo.time_plan import TimeBudget, TimePlan

# timed steps; the first one warms up and is not used
_STEPS = 4


class Forecast:
    """Times the first steps.

    Args:
        row_seconds: Time to score a row, in seconds; ``None`` if it is unknown.
    """

    def __init__(self, row_seconds: float | None = None) -> None:
        self.row_seconds = row_seconds
        self._begun = 0.0
        self._seconds: list[float] = []

    def begin(self) -> None:
        """Start timing a step."""
        self._begun = time.perf_counter()

    def end(self) -> bool:
        """Stop timing a step; return whether it was the last timed step."""
        if len(self._seconds) >= _STEPS:
            return False
        self._seconds.append(time.perf_counter() - self._begun)
        return len(self._seconds) == _STEPS

    def line(self, steps: int, every: float | None, num_dev: int, num_test: int, memory_gb: float) -> str:
        """Return the forecast in one line; empty for a run of few steps.

        Args:
            steps: Number of remaining steps.
            every: Steps between two validations; ``None`` without validations.
            num_dev: Dev rows that a validation scores.
            num_test: Held-out rows of the run.
            memory_gb: Peak memory, GiB.
        """
        if steps <= _STEPS:
            return ""
        step_seconds, row_seconds = statistics.median(self._seconds[1:]), self.row_seconds
        validations = math.ceil(steps / every) if every and every < math.inf else 0
        total = steps * step_seconds + (validations * num_dev + num_test) * (row_seconds or 0.0)
        parts = [f"{steps} steps of {step_seconds:.2g} s"]
        if row_seconds is None:
            parts.append(f"{validations} validations not counted")
        else:
            parts.append(f"{validations} validations of {num_dev * row_seconds:.2g} s")
            parts.append(f"held-out rows {num_test * row_seconds:.2g} s")
        return f"Expect     up to {duration(total)} more ({', '.join(parts)}); memory about {memory_gb:.2g} GiB"


def format_time_plan(plan: TimePlan, budget: TimeBudget) -> str:
    """Return in one line what was planned for the time of a run."""
    times, passes, number = plan.times, budget.passes, plan.validations
    mean = times.of_steps(plan.new_steps) / max(1, plan.new_steps)  # steps with new rows take longer
    parts = [f"{plan.new_steps:,} steps of {mean:.2g} s"]
    if number:
        often = "after each step" if plan.every == 1 else f"one every {plan.every} steps"
        every = f", {often}" if number > 1 and plan.every is not None else ""
        parts.append(f"{number} validation{'s' if number > 1 else ''} of {times.validation:.2g} s{every}")
    if passes.test_before + passes.test_after:
        parts.append(f"other scores {times.before + times.after:.2g} s")
    return f"Plan       {', '.join(parts)}: about {duration(plan.seconds)} of {duration(max(0.0, budget.left))} left"


def duration(seconds: float) -> str:
    """Format a duration, such as ``45 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
