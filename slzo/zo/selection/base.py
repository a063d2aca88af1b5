"""What a selection rule is."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from slzo.zo.profile import LayerStatistics


class Margin(NamedTuple):
    """How far one figure is from deciding otherwise.

    Attributes:
        errors: Distance in standard errors of the figure, at least 0.
        words: Which layer and figure, how far from what: a clause.
    """

    errors: float
    words: str


class Choice(NamedTuple):
    """The dominant layer.

    Attributes:
        layer: Counted from 0.
        reason: Why, in a few words, for the table, the summary and the JSON file.
        title: What to call it.
        margin: How clear the choice is: the smallest distance by which it would be another one, over the chosen layer and those
            that nearly won. ``None``: nothing is said of it, for want of standard errors or because nothing measured decides.
        note: What else is to be known of the choice, a line; empty: nothing.
        thresholds: ``max_abs`` or ``ratio`` and the value that it was compared with, for the picture.
    """

    layer: int
    reason: str
    title: str = "chosen layer"
    margin: Margin | None = None
    note: str = ""
    thresholds: tuple[tuple[str, float], ...] = ()


class SelectionRule(ABC):
    """Chooses a layer from the statistics of all layers, first layer first."""

    @abstractmethod
    def select(self, layers: list[LayerStatistics]) -> Choice:
        """The dominant layer.

        Raises:
            SlzoError: No layer qualifies.
        """
