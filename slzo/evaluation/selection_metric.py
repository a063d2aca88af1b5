"""The metric that checkpoints of a run are compared by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slzo.rewards.registry import PERPLEXITY


@dataclass(frozen=True)
class SelectionMetric:
    """The value that selects a checkpoint, and the metric that summarizes a run.

    Attributes:
        name: Value on the dev rows that selects a checkpoint: "loss", or "reward" or "f1" if training maximizes that.
        metric: Metric that summarizes a run on held-out rows.
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
        """Whether smaller values of ``metric`` are better."""
        return self.metric == PERPLEXITY

    @property
    def loss_name(self) -> str:
        """Name of what :meth:`distance` returns."""
        return "dev loss" if self.best is None else f"dev distance to the best {self.name} ({self.best:g})"

    def distance(self, found: Mapping[str, Any], prefix: str = "") -> float:
        """Return the loss, or the difference between the best possible and the actual reward or F1; NaN if it is unknown."""
        value = float(found.get(f"{prefix}{self.name}", math.nan))
        return value if self.best is None else self.best - value

    def upper_bound(self, distance: float, factor: float, first: float) -> float:
        """Return the largest distance that counts as at most ``factor`` times another one.

        A distance can be 0 or negative. The rise is a share of its size, and of at least a tenth of the first distance, or of
        the best reward or F1: near 0 a rise says little.
        """
        size = max(abs(distance), abs(first if self.best is None else self.best) / 10)
        return distance + (factor - 1) * size
