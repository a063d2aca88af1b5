"""The base class of selection rules, what a rule can use and what it returns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter, index
from typing import SupportsIndex

from slzo.models.prefix_cache import PrefixCache
from slzo.utils.argument_checks import ChecksOverrides
from slzo.utils.errors import broken_contract, short_repr
from slzo.zo.profile import LayerStatistics, format_figure
from slzo.zo.trial import Trial, Trials


@dataclass(frozen=True)
class Margin:
    """Distance of a figure from a value that would change the choice.

    Attributes:
        errors: Distance in standard errors of the figure, at least 0.
        description: Layer, figure and distance in words.
    """

    errors: float
    description: str


@dataclass(frozen=True)
class Choice:
    """The choice of a rule.

    Attributes:
        layer: The dominant layer, counted from 0.
        reason: Why this layer, in a few words, for the table, the summary and the JSON file.
        title: Name for the layer.
        margin: The smallest distance from another choice, over the chosen layer and those that nearly won. ``None`` if unknown:
            there are no standard errors, or no measured figure decides.
        note: A remark on the choice, in one line; may be empty.
        thresholds: ``max_abs`` or ``ratio``, and the value that it was compared with, for the plot.
        trials: Short trainings that the rule ran, by layer.
        states: Cached states that enter the chosen layer, with which the main training can start.
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
    """What a rule can use to choose a layer.

    Attributes:
        layers: Statistics of all decoder layers, in order.
        trials: Runs short trainings; ``None`` if this is not possible.
        no_trials: Why short trainings are not possible.
    """

    layers: Sequence[LayerStatistics]
    trials: Trials | None = None
    no_trials: str = "none are possible here; choose another rule"


class SelectionRule(ChecksOverrides, ABC):
    """Chooses the layer to tune from activation statistics, or from short trainings."""

    @abstractmethod
    def select(self, context: SelectionContext) -> Choice:
        """Choose the dominant layer.

        Raises:
            SlzoError: No layer qualifies, or the rule needs short trainings and they are not possible.
        """


def choice_of(rule: SelectionRule, context: SelectionContext) -> Choice:
    """Return the choice of a rule.

    Raises:
        SlzoError: The rule finds no layer, or does not return a layer of the model.
    """
    choice, last = rule.select(context), len(context.layers) - 1
    wanted = f"a Choice of a layer from 0 to {last}"
    if not isinstance(choice, Choice):
        raise broken_contract("profiler.rule", rule, f"select() returned {short_repr(choice)}", wanted)
    if not isinstance(choice.layer, SupportsIndex) or not 0 <= index(choice.layer) <= last:
        raise broken_contract("profiler.rule", rule, f"select() returned layer {short_repr(choice.layer)}", wanted)
    trials = choice.trials
    if not isinstance(trials, Mapping) or not all(isinstance(trial, Trial) for trial in trials.values()):
        wanted = "a Choice whose trials are the first values that context.trials.train() returns, by layer"
        raise broken_contract("profiler.rule", rule, f"select() returned trials {short_repr(trials)}", wanted)
    return replace(choice, layer=index(choice.layer))


CLEAR = 2.0
"""Standard errors from which on a choice is clear: about 95% of the averages over other prompts are within this distance."""


def in_errors(difference: float, error: float) -> float:
    """Return a difference in standard errors; infinity if the standard error is 0."""
    return difference / error if error > 0 else math.inf


def threshold_margin(layer: LayerStatistics, figure: str, threshold: float) -> Margin | None:
    """Return the distance of a layer's ``max_abs`` or ``ratio`` from a threshold, or ``None`` without a standard error."""
    value, error = getattr(layer, figure), getattr(layer, f"{figure}_se")
    if error is None:
        return None
    errors = in_errors(abs(value - threshold), error)
    side = "above" if value > threshold else "below"
    name = {"max_abs": "max", "ratio": "max/median"}[figure]
    return Margin(
        errors,
        f"layer {layer.index} is {errors:.1f} standard errors {side} the threshold of {threshold:,g} "
        f"({name} {format_figure(value)} ± {format_figure(error)})",
    )


def lead_margin(lead: float, variances: Sequence[float | None], winner: str, other: str) -> Margin | None:
    """Return the distance of two figures from each other, ``None`` if one of the variances that add up is unknown."""
    known = [variance for variance in variances if variance is not None]
    if len(known) < len(variances):
        return None
    errors = in_errors(lead, math.sqrt(sum(known)))
    return Margin(errors, f"{winner} is {errors:.1f} standard errors above {other}")


def smallest(margins: Iterable[Margin | None]) -> Margin | None:
    """Return the smallest margin, or ``None`` if one of them is unknown."""
    return min(_all_known(margins), key=attrgetter("errors"), default=None)


def largest(margins: Iterable[Margin | None]) -> Margin | None:
    """Return the largest margin, or ``None`` if one of them is unknown."""
    return max(_all_known(margins), key=attrgetter("errors"), default=None)


def _all_known(margins: Iterable[Margin | None]) -> list[Margin]:
    """Return the margins, or an empty list if one of them is unknown."""
    given = list(margins)
    known = [margin for margin in given if margin is not None]
    return known if len(known) == len(given) else []
