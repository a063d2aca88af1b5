"""The layer where outliers grow most."""

from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.base import Choice, SelectionRule


class MaxRatioJump(SelectionRule):
    """The layer whose ratio of largest to median magnitude grows most over the layer before it.

    Needs no threshold, so it always answers.
    """

    def select(self, layers: list[LayerStatistics]) -> Choice:
        """See :class:`SelectionRule`; the first layer is compared with a ratio of 1."""
        before = [1.0] + [layer.ratio for layer in layers[:-1]]
        jumps = [layer.ratio / max(ratio, 1.0) for layer, ratio in zip(layers, before, strict=True)]
        return Choice(
            max(range(len(layers)), key=jumps.__getitem__), "largest growth of max/median over the layer before"
        )
