"""The layer that takes the outlier out of the residual stream again."""

import math
from itertools import pairwise

from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.base import Choice, Margin, SelectionRule
from slzo.zo.selection.margin import in_words, smallest


class LargestFall(SelectionRule):
    """The layer whose output's largest magnitude is furthest below its input's, in absolute terms.

    Massive activations are written by one layer and taken out by another near the end (Sun et al. 2024, arXiv 2402.17762). The
    second writes as strongly as the first, and it is cheap to tune: all layers below it are a prefix, whose states are computed
    once for each row. Needs no threshold. Where no layer lowers the largest magnitude it is the last one. docs/results.md
    compares the layers that the rules choose.
    """

    def select(self, layers: list[LayerStatistics]) -> Choice:
        falls = [below.max_abs - layer.max_abs for below, layer in pairwise(layers)]
        if not falls or max(falls) <= 0:
            return Choice(layers[-1].index, "the last layer, as none lowers the largest magnitude")
        best = max(range(len(falls)), key=falls.__getitem__)
        margin = smallest(_margin(layers, falls, best, other) for other in range(len(falls)) if other != best)
        reason = f"largest fall of max |h| over the layer before, by {in_words(falls[best])}"
        return Choice(layers[best + 1].index, reason, "outlier-removing layer", margin)


def _margin(layers: list[LayerStatistics], falls: list[float], best: int, other: int) -> Margin | None:
    """Standard errors of the four maxima are taken as independent, though the layers share their sequences: a rough one."""
    errors = [layers[place].max_abs_se for fall in (best, other) for place in (fall, fall + 1)]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    spread, ahead = math.sqrt(sum(error**2 for error in known)), falls[best] - falls[other]
    distance = ahead / spread if spread > 0 else math.inf
    return Margin(
        distance,
        f"layer {layers[best + 1].index}'s fall of {in_words(falls[best])} is {distance:.1f} standard errors above layer "
        f"{layers[other + 1].index}'s of {in_words(falls[other])}",
    )
