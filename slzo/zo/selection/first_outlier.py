"""The first layer with massive activations."""

from typing import Literal

from slzo.errors import SlzoError
from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.base import Choice, SelectionRule
from slzo.zo.selection.max_ratio_jump import MaxRatioJump


class FirstOutlierLayer(SelectionRule):
    """First layer with massive activations (Sun et al. 2024, arXiv 2402.17762; Dominant-Layer ZO, arXiv 2606.05516).

    Args:
        max_abs: A layer's largest magnitude must exceed this.
        ratio: Its largest magnitude must exceed this many times its median magnitude.
        fallback: What to do when no layer qualifies: ``error``, or ``max_ratio_jump`` (and say so).
    """

    def __init__(
        self, max_abs: float = 100.0, ratio: float = 1000.0, fallback: Literal["error", "max_ratio_jump"] = "error"
    ) -> None:
        self.max_abs = max_abs
        self.ratio = ratio
        self.fallback = fallback

    def select(self, layers: list[LayerStatistics]) -> Choice:
        """See :class:`SelectionRule`.

        Raises:
            SlzoError: No layer qualifies and ``fallback`` is ``error``.
        """
        rule = f"first layer with max > {self.max_abs:g} and max/median > {self.ratio:g}"
        for layer in layers:
            if layer.max_abs > self.max_abs and layer.ratio > self.ratio:
                return Choice(layer.index, rule, "first outlier layer")
        if self.fallback == "max_ratio_jump":
            choice = MaxRatioJump().select(layers)
            return Choice(choice.layer, f"{rule}; none, so {choice.reason}")
        best = max(layers, key=lambda layer: layer.ratio)
        raise SlzoError(
            f"profiler.rule: no layer has max > {self.max_abs:g} and max/median > {self.ratio:g}; the closest is layer "
            f"{best.index} with max {best.max_abs:.4g} and ratio {best.ratio:.4g}; lower the thresholds, set "
            "profiler.rule.fallback to max_ratio_jump, or choose a layer with model.layer"
        )
