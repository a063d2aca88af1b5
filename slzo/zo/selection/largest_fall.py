"""The layer that takes the outlier out of the residual stream again."""

import itertools

from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.base import Choice, SelectionRule


class LargestFall(SelectionRule):
    """The layer whose output has the largest magnitude most below that of its input, in absolute terms.

    Massive activations are written by one layer and taken out by one near the end, before the final norm would be blinded by
    them. That layer writes as strongly as the first outlier layer does, and it is cheap: everything below it is a prefix, whose
    states are computed once for each row. Needs no threshold. Without any outlier, where no layer lowers the largest magnitude,
    it is the last layer.
    """

    def select(self, layers: list[LayerStatistics]) -> Choice:
        falls = [before.max_abs - layer.max_abs for before, layer in itertools.pairwise(layers)]
        if not falls or max(falls) <= 0:
            return Choice(layers[-1].index, "the last layer, as none lowers the largest magnitude")
        best = max(range(len(falls)), key=falls.__getitem__)
        return Choice(
            layers[best + 1].index, f"largest fall of max |h|, by {falls[best]:.4g}", "outlier-removing layer"
        )
