"""What checkpoints of a run are compared by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slzo.rewards.registry import PERPLEXITY


@dataclass(frozen=True)
class SelectionMetric:
    """The value that chooses a checkpoint, and the metric that sums a run up.

    Attributes:
        name: Value of the dev rows that chooses a checkpoint: loss, or reward or f1 where training maximizes that.
        metric: Metric that sums a run up on held-out rows.
        best: Largest possible reward or F1; ``None`` for a loss.
    """

    name: str
    metric: str
    best: float | None = None

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether smaller or larger values are better."""
        return "min" if self.best is None else "max"

    @property
    def lower_is_better(self) -> bool:
        """Whether smaller values of the metric are better."""
        return self.metric == PERPLEXITY

    @property
    def description(self) -> str:
        """Name of what :meth:`distance` returns."""
        return "dev loss" if self.best is None else f"dev distance to the best {self.name}, {self.best:g},"

    def distance(self, found: Mapping[str, Any], prefix: str = "") -> float:
        """Distance of scored rows from the best possible: the loss, or how much of the reward or F1 is missing."""
        value = float(found.get(f"{prefix}{self.name}", math.nan))
        return value if self.best is None else self.best - value
