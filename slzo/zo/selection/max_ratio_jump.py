"""The layer in which outliers grow most."""

import math
from collections.abc import Sequence

from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.base import Choice, Margin, SelectionContext, SelectionRule, lead_margin, smallest


class MaxRatioJump(SelectionRule):
    """The layer whose ratio of largest to median magnitude grows most over the layer before it.

    Needs no threshold, so it always answers.
    """

    def select(self, context: SelectionContext) -> Choice:
        """See :class:`SelectionRule`. The first layer is compared with a ratio of 1.

        The margin is the smallest distance between the logarithm of the largest growth and that of another layer. Standard errors
        are treated as independent. This is approximate, because the layers share their sequences.
        """
        layers = context.layers
        before = [1.0] + [layer.ratio for layer in layers[:-1]]
        jumps = [layer.ratio / max(ratio, 1.0) for layer, ratio in zip(layers, before, strict=True)]
        best = max(range(len(layers)), key=jumps.__getitem__)
        margin = smallest(_margin(layers, jumps, best, other) for other in range(len(layers)) if other != best)
        return Choice(best, "max/median grows most across it", margin=margin)


def _margin(layers: Sequence[LayerStatistics], jumps: list[float], best: int, other: int) -> Margin | None:
    if jumps[other] <= 0:
        return None
    variances = [_log_variance(layers, layer) for layer in (best, other)]
    lead = math.log(jumps[best] / jumps[other])
    return lead_margin(
        lead, variances, f"layer {best}'s growth of {jumps[best]:.3g} times", f"layer {other}'s of {jumps[other]:.3g}"
    )


def _log_variance(layers: Sequence[LayerStatistics], layer: int) -> float | None:
    """Return the variance of the logarithm of a layer's growth, to first order."""
    total = 0.0
    for one in layers[max(layer - 1, 0) : layer + 1]:
        if one.ratio_se is None or one.ratio <= 0:
            return None
        total += (one.ratio_se / one.ratio) ** 2
    return total
