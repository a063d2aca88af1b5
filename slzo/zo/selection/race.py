"""Layers that the statistics point at, to be compared by short trainings."""

import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

from slzo.errors import SlzoError
from slzo.zo.profile import LayerStatistics
from slzo.zo.scopes.base import check_layer
from slzo.zo.selection.base import Choice, SelectionRule
from slzo.zo.selection.first_outlier import FirstOutlierLayer
from slzo.zo.selection.largest_fall import LargestFall
from slzo.zo.selection.max_ratio_jump import MaxRatioJump

Equal = Literal["work", "steps"]


class Race(SelectionRule):
    """The layer with the lowest dev loss after short trainings of the layers that the other rules name, and of a few more.

    Entrants are the choices of LargestFall, FirstOutlierLayer and MaxRatioJump, the neighbours of the first, the last layer, and
    as a control the one in the middle. They share rows, directions and the states below them, each has its own measured
    step size where model.optimizer.lr is auto, and who is in the worse half after a third ends there. A late layer's step is
    cheap, since only the layers from it on are run: with equal work, the measuring included, it takes more of them. The most
    sensitive layers do not enter: to measure the sensitivity of all layers takes longer than the race.

    Args:
        share: What the race may cost, as a share of the whole training in LargestFall's layer (if that does not enter, in the
            lowest that does), > 0; the others are left out from below where that is not enough.
        equal: What all get as much of: work (rows times layers they go through, so about time), or steps.
        layers: Entrants, counted from 0; left out, those above.
        dev_rows: Rows that the dev loss is taken on, at least 16.
    """

    def __init__(
        self, share: float = 0.25, equal: Equal = "work", layers: list[int] | None = None, dev_rows: int = 96
    ) -> None:
        if not 0 < share < math.inf:
            raise SlzoError(f"profiler.rule.share {share}: must be above 0; 0.25 is a quarter of the training")
        if equal not in ("work", "steps"):
            raise SlzoError(f"profiler.rule.equal {equal!r}: choose work or steps")
        if layers is not None and len(set(layers)) < 2:
            raise SlzoError(f"profiler.rule.layers {layers}: give at least two, or leave it out")
        if dev_rows < 16:
            raise SlzoError(
                f"profiler.rule.dev_rows {dev_rows}: so few rows do not tell layers apart; give at least 16"
            )
        self.share = share
        self.equal: Equal = equal
        self.layers = layers
        self.dev_rows = dev_rows

    def entrants(self, layers: list[LayerStatistics]) -> tuple[int, ...]:
        """The layers to train, rising.

        Raises:
            SlzoError: One that was asked for is not there.
        """
        if self.layers is not None:
            for layer in self.layers:
                check_layer(layer, len(layers), "profiler.rule.layers", left_out="the race choose")
            return tuple(sorted(set(self.layers)))
        fall = LargestFall().select(layers).layer
        found = {fall - 1, fall, fall + 1, len(layers) - 1, len(layers) // 2, *outlier_layers(layers)}
        return tuple(sorted(layer for layer in found if 0 <= layer < len(layers)))

    def reference(self, layers: list[LayerStatistics]) -> int:
        """The layer whose training the cost is a share of: the one that would be tuned without a race, if it is in it."""
        entrants, fall = self.entrants(layers), LargestFall().select(layers).layer
        return fall if fall in entrants else min(entrants)

    def select(self, layers: list[LayerStatistics]) -> Choice:
        raise SlzoError(
            "profiler.rule Race: trains layers, which statistics alone do not allow; use it with slzo fit or profile"
        )


def outlier_layers(layers: list[LayerStatistics]) -> Iterable[int]:
    """What the rules say that look for where outliers come."""
    for rule in (FirstOutlierLayer(), MaxRatioJump()):
        with suppress(SlzoError):  # it finds none
            yield rule.select(layers).layer
