"""Standard errors of means."""

import math
import statistics
from collections.abc import Sequence


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; ``None`` for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
