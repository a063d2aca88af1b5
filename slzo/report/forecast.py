"""Estimate how long a run will take from its first steps."""

import math
import statistics
import time

from slzo.utils.duration import duration

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
