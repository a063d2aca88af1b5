"""Zeroth-order training without Lightning. The names below work on any ``torch.nn.Module``."""

from slzo.zo.auto_step import AutoStep
from slzo.zo.closure import ClosureLoss
from slzo.zo.estimators.base import Request
from slzo.zo.step import take_step
from slzo.zo.tuned import TunedTensors

__all__ = ["AutoStep", "ClosureLoss", "Request", "TunedTensors", "take_step"]
