"""Limits a projected gradient that is far outside of those before it."""

import statistics
from collections import deque
from dataclasses import dataclass, field

from slzo.zo.estimators.base import Estimate

_REMEMBERED = 100
_NEEDED = 10


@dataclass
class ProjectedGradHistory:
    """Sizes of the projected gradients of the last steps, mean over the queries, and how many steps were clipped."""

    sizes: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def clip(self, estimate: Estimate, factor: float) -> None:
        """Scale the gradient of an estimate down to ``factor`` times the median size, where it is above; note the size.

        The first steps are taken as they are. An estimate that is not finite is left alone and not noted.
        """
        if not estimate.finite:
            return
        size = sum(map(abs, estimate.projected_grad)) / len(estimate.projected_grad)
        limit = factor * statistics.median(self.sizes) if len(self.sizes) >= _NEEDED else size
        self.sizes.append(size)
        if 0 < limit < size:
            estimate.scale_gradient(limit / size)
