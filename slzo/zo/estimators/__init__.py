"""Gradient estimates from loss values; each kind is one file, and this list registers it."""

from slzo.zo.estimators.base import WHOLE, Estimate, Estimator, Point, Request, Share
from slzo.zo.estimators.derivatives import Backprop, ForwardGradient
from slzo.zo.estimators.one_sided import FZO, OneSided
from slzo.zo.estimators.spsa import LOZO, SPSA

__all__ = [
    "FZO",
    "LOZO",
    "SPSA",
    "WHOLE",
    "Backprop",
    "Estimate",
    "Estimator",
    "ForwardGradient",
    "OneSided",
    "Point",
    "Request",
    "Share",
]
