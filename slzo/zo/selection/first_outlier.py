"""The first layer with massive activations."""

import math
from collections.abc import Sequence

from slzo.utils.errors import SlzoError
from slzo.zo.profile import LayerStatistics, format_figure
from slzo.zo.selection.base import Choice, Margin, SelectionContext, SelectionRule, largest, smallest, threshold_margin


class FirstOutlierLayer(SelectionRule):
    """First layer with massive activations (Sun et al. 2024, arXiv 2402.17762; Dominant-Layer ZO, arXiv 2606.05516).

    Args:
        max_abs: A layer's largest magnitude must exceed this.
        ratio: Its largest magnitude must exceed this many times its median magnitude.
    """

    def __init__(self, max_abs: float = 100.0, ratio: float = 1000.0) -> None:
        for name, value in (("max_abs", max_abs), ("ratio", ratio)):
            if not 0 <= value < math.inf:
                raise SlzoError(f"profiler.rule.{name} {value}: must be a number of at least 0")
        self.max_abs = max_abs
        self.ratio = ratio

    def select(self, context: SelectionContext) -> Choice:
        """See :class:`SelectionRule`. The margin is the smallest of the chosen layer and the layers before it.

        Raises:
            SlzoError: No layer qualifies.
        """
        layers = context.layers
        rule = f"first layer with max > {self.max_abs:g} and max/median > {self.ratio:g}"
        qualified = [layer for layer in layers if self._qualifies(layer)]
        if qualified:
            first = qualified[0].index
            margin = smallest(self._margin(layer) for layer in layers if layer.index <= first)
            note = self._note(qualified, layers)
            return Choice(first, rule, "first outlier layer", margin, note, self._thresholds)
        best = max(layers, key=lambda layer: layer.ratio)
        error = "" if best.ratio_se is None else f" ± {format_figure(best.ratio_se)}"
        raise SlzoError(
            f"profiler.rule: no layer has max > {self.max_abs:g} and max/median > {self.ratio:g}; the closest is layer "
            f"{best.index} with max {best.max_abs:.4g} and ratio {best.ratio:.4g}{error}; lower the thresholds "
            "(profiler.rule.max_abs, profiler.rule.ratio), use --profiler.rule MaxRatioJump, or choose a layer with model.layer"
        )

    @property
    def _thresholds(self) -> tuple[tuple[str, float], ...]:
        return (("max_abs", self.max_abs), ("ratio", self.ratio))

    def _qualifies(self, layer: LayerStatistics) -> bool:
        return layer.max_abs > self.max_abs and layer.ratio > self.ratio

    def _margin(self, layer: LayerStatistics) -> Margin | None:
        """Return how far the layer is from the other side: one figure must fall below, or all low figures must rise above."""
        if self._qualifies(layer):
            return smallest(threshold_margin(layer, *threshold) for threshold in self._thresholds)
        too_low = [(figure, value) for figure, value in self._thresholds if getattr(layer, figure) <= value]
        return largest(threshold_margin(layer, *threshold) for threshold in too_low)

    def _note(self, qualified: list[LayerStatistics], layers: Sequence[LayerStatistics]) -> str:
        """Return a remark if the thresholds hardly distinguish the layers; outliers may fade in the last layers."""
        if qualified[0].index > 0 or len(qualified) <= len(layers) / 2:
            return ""
        every = len(qualified) == len(layers)
        found = (
            f"All {len(layers)} layers"
            if every
            else f"{len(qualified)} of {len(layers)} layers, starting with the first,"
        )
        return (
            f"{found} are above the thresholds: the rule's choice carries {'no' if every else 'little'} information here; try "
            "another rule (--profiler.rule), let slzo sweep train the layers, or set --model.layer."
        )
