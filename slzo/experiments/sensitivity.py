"""The sensitivity of the loss to random directions in a layer, before training."""

import math
import statistics
from dataclasses import dataclass

import torch

from slzo.experiments.layer_trials import LayerTrials
from slzo.training.build import make_stepper
from slzo.utils.errors import SlzoError
from slzo.utils.sampling_error import standard_error
from slzo.zo.estimators import Point

SENSITIVITY_ROWS = 16
"""Number of training rows that the sensitivity is measured on."""

# Eps if model.eps is auto, so that all layers are compared at the same distance.
_EPS = 1e-3
# With fewer directions the estimated standard error is unreliable.
_LEAST_DIRECTIONS = 8
_MAX_ERROR = 0.25


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of the loss before training, |L+ - L-| / (2 eps): mean over a number of random directions, with its error."""

    mean: float
    standard_error: float
    directions: int


def measure_sensitivity(trials: LayerTrials, layer: int, directions: int, seed: int) -> Sensitivity:
    """Measure the sensitivity of one layer along random directions, on the first :data:`SENSITIVITY_ROWS` training rows.

    The measurement ends when the standard error is below a quarter of the mean, after 8 directions at the earliest and
    ``directions`` at the latest. Directions and rows follow from the seed, and are the same for every layer.

    Raises:
        SlzoError: The loss is not finite at this distance.
    """
    trials.carry_prefix(layer)
    options, data = trials.options, trials.data
    eps = options.step.eps or _EPS
    batch = next(data.training_batches(seed, SENSITIVITY_ROWS)).to(trials.parts.model.device)
    slopes: list[float] = []
    error = None
    with trials.tuned(layer) as model, torch.no_grad():
        loss = make_stepper(model, options, data).loss(batch)
        for query in range(directions):
            z = model.tensors.draw(seed, 0, query)
            high, low = loss.at([Point(z, eps), Point(z, -eps)]).tolist()
            slopes.append(abs(high - low) / (2 * eps))
            if not math.isfinite(slopes[-1]):
                raise SlzoError(
                    f"model.eps {eps:g}: the loss of layer {layer} is not finite at this distance; give a smaller one, or "
                    "directions 0 to measure no sensitivity"
                )
            error = standard_error(slopes)
            enough = error is not None and error < _MAX_ERROR * statistics.fmean(slopes)
            if enough and len(slopes) >= _LEAST_DIRECTIONS:
                break
    return Sensitivity(statistics.fmean(slopes), math.nan if error is None else error, len(slopes))
