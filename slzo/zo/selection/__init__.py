"""Rules that read a profile and name the dominant layer; each is one file, and this list registers it."""

from slzo.zo.selection.auto import Auto
from slzo.zo.selection.base import Choice, Margin, SelectionRule
from slzo.zo.selection.first_outlier import FirstOutlierLayer
from slzo.zo.selection.fixed import FixedLayer
from slzo.zo.selection.largest_fall import LargestFall
from slzo.zo.selection.max_ratio_jump import MaxRatioJump
from slzo.zo.selection.race import Race

__all__ = [
    "Auto",
    "Choice",
    "FirstOutlierLayer",
    "FixedLayer",
    "LargestFall",
    "Margin",
    "MaxRatioJump",
    "Race",
    "SelectionRule",
]
