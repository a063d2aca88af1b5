"""Standard errors of means, and how they are shown."""

import math
import statistics
from collections.abc import Sequence


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; ``None`` for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def plus_minus(error: float | None, digits: str = ".4f") -> str:
    """Format the standard error of a figure, to follow that figure; empty if there is none."""
    return "" if error is None else f" ± {error:{digits}}"
