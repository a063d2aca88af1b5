"""What a selection rule is."""

from abc import ABC, abstractmethod

from slzo.zo.profile import LayerStatistics


class SelectionRule(ABC):
    """Chooses a layer from the statistics of all layers, first layer first."""

    @abstractmethod
    def select(self, layers: list[LayerStatistics]) -> int:
        """Index of the dominant layer."""

    @abstractmethod
    def describe(self) -> str:
        """The rule in a few words, for the table and the JSON file."""
