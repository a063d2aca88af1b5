"""Zeroth-order training without Lightning. The names below work on any ``torch.nn.Module``."""

from slzo.zo.auto_step import AutoStep
from slzo.zo.closure import ClosureLoss
from slzo.zo.estimators.base import EstimatorContext
from slzo.zo.step import take_step
from slzo.zo.tuned import TunedTensors

__all__ = ["AutoStep", "ClosureLoss", "EstimatorContext", "TunedTensors", "take_step"]
