"""Estimators of the gradient. Each is one file, imported and listed here."""

from slzo.zo.estimators.backprop import Backprop
from slzo.zo.estimators.base import Estimate, Estimator, EstimatorContext
from slzo.zo.estimators.evolution_strategy import EvolutionStrategy
from slzo.zo.estimators.fzoo import FZOO
from slzo.zo.estimators.layer_output import LayerOutputPerturbation
from slzo.zo.estimators.lozo import LOZO
from slzo.zo.estimators.one_sided import OneSided
from slzo.zo.estimators.spsa import SPSA
from slzo.zo.loss import Loss, LossReport
from slzo.zo.tuned import Point

ESTIMATORS = (Backprop, EvolutionStrategy, FZOO, LayerOutputPerturbation, LOZO, OneSided, SPSA)
"""The estimators that the command line offers by name."""


def default_estimator(one_layer: bool, has_weight_options: bool) -> type[Estimator]:
    """Return the default: SPSA if more than one layer is tuned, or if an option is given that only perturbed weights have."""
    return LayerOutputPerturbation if one_layer and not has_weight_options else SPSA


__all__ = [
    "ESTIMATORS",
    "FZOO",
    "LOZO",
    "SPSA",
    "Backprop",
    "Estimate",
    "Estimator",
    "EstimatorContext",
    "EvolutionStrategy",
    "LayerOutputPerturbation",
    "Loss",
    "LossReport",
    "OneSided",
    "Point",
    "default_estimator",
]
