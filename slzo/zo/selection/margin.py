"""How far a layer's figures are from a rule's thresholds, in their standard errors."""

import math
from collections.abc import Iterable

from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.base import Margin

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
        f"({name} {in_words(value)} +- {in_words(error)})",
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


def in_words(value: float) -> str:
    """A figure as it stands in a sentence."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _known(margins: list[Margin | None]) -> list[Margin]:
    return [margin for margin in margins if margin is not None]


def _errors(margin: Margin) -> float:
    return margin.errors
