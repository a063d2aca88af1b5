"""The layer that removes the outlier, or the winner of a race if that choice is in doubt."""

from collections.abc import Sequence
from dataclasses import replace

from slzo.utils.console import rank_zero_print
from slzo.utils.errors import SlzoError
from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.base import CLEAR, Choice, SelectionContext, SelectionRule
from slzo.zo.selection.outlier_removing import OutlierRemovingLayer
from slzo.zo.selection.race import Race, outlier_layers
from slzo.zo.trial import Trials

# Smallest share of the loss that a promising first step removes.
_MIN_GAIN = 0.01


class Auto(SelectionRule):
    """OutlierRemovingLayer's layer if this choice is clear and its first step is promising; otherwise the winner of a Race.

    The race compares that layer, the last one, and if there is room the choices of FirstOutlierLayer and MaxRatioJump.

    The first step is promising if the measured step size (model.optimizer.lr auto) expects it to lower the loss by at least 1%.
    If it expects only a fraction of a percent, because the loss is curved along random directions, the layer learns slowly on
    this task, and other layers may not. This happens with tasks whose loss is that of a free answer (COPA, SQuAD, DROP);
    docs/results.md has the figures. Only the margin of the statistics is checked with LayerOutputPerturbation and Backprop, which
    measure no step size, with a given rate, and in half precision, where rounding hides the curvature. With generated answers,
    several processes, no dev rows or too few steps for a race, nothing is checked.

    Args:
        share: Largest cost of a race, as a share of the whole training in OutlierRemovingLayer's layer, > 0; if it is too
            small for all candidates, the lowest ones are left out.
    """

    def __init__(self, share: float = 0.25) -> None:
        Race(share)  # validates share
        self.share = share

    def select(self, context: SelectionContext) -> Choice:
        choice, trials = OutlierRemovingLayer().select(context), context.trials
        if trials is None:
            return choice
        is_clear = choice.margin is None or choice.margin.errors >= CLEAR
        if is_clear and not trials.measures_rate:
            return choice  # planning a race would measure the time of its steps
        race = self._race(context.layers, trials, choice)
        if race is None or not (doubt := self._doubt(choice, trials)):
            return choice
        rank_zero_print(
            f"Layer {choice.layer} ({choice.reason}): {doubt}. A race will decide; --model.layer {choice.layer} skips it."
        )
        winner = race.select(context)
        note = f"OutlierRemovingLayer chose layer {choice.layer}: {doubt}. {winner.note}".rstrip()
        return replace(winner, note=note)

    def _race(self, layers: Sequence[LayerStatistics], trials: Trials, choice: Choice) -> Race | None:
        """Return the race to run if the choice is in doubt, or ``None`` if it cannot run or has only one candidate."""
        candidates = {choice.layer, layers[-1].index, *outlier_layers(layers)}
        if trials.generates or not trials.num_dev or len(candidates) < 2:
            return None
        race = Race(self.share, layers=sorted(candidates))
        return race if race.plan(layers, trials).steps else None

    def _doubt(self, choice: Choice, trials: Trials) -> str:
        """Return why the choice is in doubt; empty if it is not."""
        if choice.margin is not None and choice.margin.errors < CLEAR:
            return f"the choice is not clear, {choice.margin.description}"
        try:
            step = trials.step_size(choice.layer)
        except SlzoError:  # the main training also measures, and reports the error
            return ""
        # with matrices that start at 0 (step.largest > 0) the first step says nothing about later ones
        if step.largest > 0 or step.first_gain >= _MIN_GAIN:
            return ""
        return f"its first step should lower the loss by {step.first_gain:.2%}, less than {_MIN_GAIN:.0%}"
