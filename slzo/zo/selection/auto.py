"""The layer that takes the outlier out, if a look at the task agrees."""

import math

from slzo.errors import SlzoError
from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.base import Choice, SelectionRule
from slzo.zo.selection.largest_fall import LargestFall
from slzo.zo.selection.race import Race, outlier_layers


class Auto(SelectionRule):
    """LargestFall's layer where it is clear and a step there promises something; elsewhere a Race decides.

    In the race are that layer, the last one, and if there is room the choices of FirstOutlierLayer and MaxRatioJump.

    A step promises what the measured step size (model.optimizer.lr auto) is to lower the loss by. Where it is a fraction of a
    percent, since the loss is curved along random directions, that layer learns slowly on this task and others may not: so it is
    with tasks whose loss is that of a free answer (COPA, SQuAD, DROP); docs/results.md has the figures. With a rate that is
    given, and in half precision, where rounding hides the curvature, only the statistics are asked for their margin; with
    generated answers, on several processes, and without dev rows or steps enough for a race, nothing is checked.

    Args:
        share: What a race may cost, as a share of the whole training in LargestFall's layer, > 0; layers for which that is not
            enough are left out, from below.
        promise: Share of the loss that the first step is to lower it by, at least; 0 only asks for a clear choice.
    """

    def __init__(self, share: float = 0.25, promise: float = 0.01) -> None:
        if not (math.isfinite(promise) and promise >= 0):
            raise SlzoError(
                f"profiler.rule.promise {promise}: a share of the loss, 0 or more; 0.01 is a hundredth of it"
            )
        Race(share)  # refuses what it cannot use
        self.share = share
        self.promise = promise

    def select(self, layers: list[LayerStatistics]) -> Choice:
        """What the statistics say, unchecked."""
        return LargestFall().select(layers)

    def race(self, layers: list[LayerStatistics]) -> Race | None:
        """The one to run in doubt; ``None`` if all name the same layer."""
        found = {self.select(layers).layer, layers[-1].index, *outlier_layers(layers)}
        return Race(self.share, layers=sorted(found)) if len(found) > 1 else None
