"""A layer chosen by hand."""

from slzo.errors import SlzoError
from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.base import Choice, SelectionRule


class FixedLayer(SelectionRule):
    """A layer chosen beforehand; the profile is still made and shown.

    Args:
        index: The layer, counted from 0.
    """

    def __init__(self, index: int) -> None:
        self.index = index

    def select(self, layers: list[LayerStatistics]) -> Choice:
        """See :class:`SelectionRule`.

        Raises:
            SlzoError: The model has no such layer.
        """
        if not 0 <= self.index < len(layers):
            raise SlzoError(f"profiler.rule.index {self.index}: the model has layers 0 to {len(layers) - 1}")
        return Choice(self.index, f"fixed to layer {self.index}")
