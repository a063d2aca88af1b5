"""Gradient estimates from loss values; each kind is one file, and this list registers it."""

from slzo.zo.estimators.backprop import Backprop
from slzo.zo.estimators.base import Estimate, Estimator, Loss, Point, Request, RowShare
from slzo.zo.estimators.evolution_strategy import EvolutionStrategy
from slzo.zo.estimators.forward_gradient import ForwardGradient
from slzo.zo.estimators.fzo import FZO
from slzo.zo.estimators.lozo import LOZO
from slzo.zo.estimators.one_sided import OneSided
from slzo.zo.estimators.spsa import SPSA

__all__ = [
    "FZO",
    "LOZO",
    "SPSA",
    "Backprop",
    "Estimate",
    "Estimator",
    "EvolutionStrategy",
    "ForwardGradient",
    "Loss",
    "OneSided",
    "Point",
    "Request",
    "RowShare",
]
