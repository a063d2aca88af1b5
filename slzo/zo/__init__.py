"""Zeroth-order steps without Lightning; the names below work on any ``torch.nn.Module``."""

from slzo.zo.closure import ClosureLoss
from slzo.zo.estimators.base import Request
from slzo.zo.step import take_step
from slzo.zo.step_size import StepSize
from slzo.zo.tuned import TunedTensors

__all__ = ["ClosureLoss", "Request", "StepSize", "TunedTensors", "take_step"]
