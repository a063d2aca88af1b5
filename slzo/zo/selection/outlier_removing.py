"""The layer that removes the outlier from the residual stream."""

from collections.abc import Sequence
from itertools import pairwise

from slzo.zo.profile import LayerStatistics, format_figure
from slzo.zo.selection.base import Choice, Margin, SelectionContext, SelectionRule, lead_margin, smallest


class OutlierRemovingLayer(SelectionRule):
    """The layer whose output has the largest magnitude furthest below that of its input, in absolute terms.

    Massive activations are written by one layer and removed by another near the end (Sun et al. 2024, arXiv 2402.17762). The
    second writes as strongly as the first, and it is cheap to tune: all layers below it are a prefix, whose states are computed
    once for each row. Needs no threshold. If no layer lowers the largest magnitude, it chooses the last one. docs/results.md
    compares the layers that the rules choose.
    """

    def select(self, context: SelectionContext) -> Choice:
        """See :class:`SelectionRule`. The margin is the smallest distance from the fall of another layer."""
        layers = context.layers
        falls = [below.max_abs - layer.max_abs for below, layer in pairwise(layers)]
        if not falls or max(falls) <= 0:
            return Choice(layers[-1].index, "the last layer, as none lowers the largest magnitude")
        best = max(range(len(falls)), key=falls.__getitem__)
        margin = smallest(_margin(layers, falls, best, other) for other in range(len(falls)) if other != best)
        reason = f"max |h| falls most across it, by {format_figure(falls[best])}"
        return Choice(layers[best + 1].index, reason, "outlier-removing layer", margin)


def _margin(layers: Sequence[LayerStatistics], falls: list[float], best: int, other: int) -> Margin | None:
    """Treat the standard errors of the four maxima as independent. This is approximate: the layers share their sequences."""
    standard_errors = [layers[index].max_abs_se for fall in (best, other) for index in (fall, fall + 1)]
    return lead_margin(
        falls[best] - falls[other],
        [None if error is None else error**2 for error in standard_errors],
        f"layer {layers[best + 1].index}'s fall of {format_figure(falls[best])}",
        f"layer {layers[other + 1].index}'s of {format_figure(falls[other])}",
    )
