"""What a selection rule is given and what it returns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from slzo.models.prefix_cache import PrefixCache
from slzo.zo.profile import LayerStatistics, format_figure
from slzo.zo.trial import Trial, Trials


@dataclass(frozen=True)
class Margin:
    """How far one figure is from changing the decision.

    Attributes:
        errors: Distance in standard errors of the figure, at least 0.
        description: Which layer and figure, and how far from what.
    """

    errors: float
    description: str


@dataclass(frozen=True)
class Choice:
    """The dominant layer.

    Attributes:
        layer: Decoder layer, counted from 0.
        reason: Why, in a few words, for the table, the summary and the JSON file.
        title: Name for the layer.
        margin: How clear the choice is: the smallest distance by which it would be another one, over the chosen layer and those
            that nearly won. ``None`` if it is not known: there are no standard errors, or nothing measured decides.
        note: Anything else about the choice, in one line; empty if there is nothing.
        thresholds: ``max_abs`` or ``ratio`` and the value that it was compared with, for the picture.
        trials: Short trainings that the rule ran, by layer.
        states: Kept states that enter the chosen layer, for the training to start with.
    """

    layer: int
    reason: str
    title: str = "chosen layer"
    margin: Margin | None = None
    note: str = ""
    thresholds: tuple[tuple[str, float], ...] = ()
    trials: Mapping[int, Trial] = field(default_factory=dict)
    states: PrefixCache | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class SelectionContext:
    """What a rule may look at.

    Attributes:
        layers: Statistics of all decoder layers, the first layer first.
        trials: Runs short trainings; ``None`` where that is not possible.
        no_trials: Why it is not possible.
    """

    layers: Sequence[LayerStatistics]
    trials: Trials | None = None
    no_trials: str = "only the statistics are known here"


class SelectionRule(ABC):
    """Chooses the layer to tune from activation statistics, or from short trainings."""

    @abstractmethod
    def select(self, context: SelectionContext) -> Choice:
        """The dominant layer.

        Raises:
            SlzoError: No layer qualifies, or the rule needs trainings and there can be none.
        """


CLEAR = 2.0
"""Standard errors from which a choice is clear: about 95% of the averages over other prompts lie within."""


def threshold_margin(layer: LayerStatistics, figure: str, threshold: float) -> Margin | None:
    """How far a layer's ``max_abs`` or ``ratio`` is from a threshold; ``None`` without a standard error."""
    value, error = getattr(layer, figure), getattr(layer, f"{figure}_se")
    if error is None:
        return None
    errors = abs(value - threshold) / error if error > 0 else math.inf
    side = "above" if value > threshold else "below"
    name = {"max_abs": "max", "ratio": "max/median"}[figure]
    return Margin(
        errors,
        f"layer {layer.index} is {errors:.1f} standard errors {side} the threshold of {threshold:,g} "
        f"({name} {format_figure(value)} +- {format_figure(error)})",
    )


def smallest(margins: Iterable[Margin | None]) -> Margin | None:
    """The smallest margin; ``None`` if one is not known."""
    found = list(margins)
    known = _known(found)
    return min(known, key=_errors, default=None) if len(known) == len(found) else None


def largest(margins: Iterable[Margin | None]) -> Margin | None:
    """The largest margin; ``None`` if one is not known."""
    found = list(margins)
    known = _known(found)
    return max(known, key=_errors, default=None) if len(known) == len(found) else None


def _known(margins: list[Margin | None]) -> list[Margin]:
    return [margin for margin in margins if margin is not None]


def _errors(margin: Margin) -> float:
    return margin.errors
