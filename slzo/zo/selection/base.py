"""What a selection rule is."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from slzo.zo.profile import LayerStatistics


class Choice(NamedTuple):
    """The dominant layer.

    Attributes:
        layer: Counted from 0.
        reason: Why, in a few words, for the table, the summary and the JSON file.
        title: What to call it.
    """

    layer: int
    reason: str
    title: str = "chosen layer"


class SelectionRule(ABC):
    """Chooses a layer from the statistics of all layers, first layer first."""

    @abstractmethod
    def select(self, layers: list[LayerStatistics]) -> Choice:
        """The dominant layer.

        Raises:
            SlzoError: No layer qualifies.
        """
