"""Rules that choose the dominant layer. Each is one file, imported and listed here."""

from slzo.zo.selection.auto import Auto
from slzo.zo.selection.base import Choice, Margin, SelectionContext, SelectionRule, choice_of
from slzo.zo.selection.first_outlier import FirstOutlierLayer
from slzo.zo.selection.max_ratio_jump import MaxRatioJump
from slzo.zo.selection.outlier_removing import OutlierRemovingLayer
from slzo.zo.selection.race import Race

RULES = (Auto, FirstOutlierLayer, MaxRatioJump, OutlierRemovingLayer, Race)
"""The rules that the command line offers by name."""

__all__ = [
    "RULES",
    "Auto",
    "Choice",
    "FirstOutlierLayer",
    "Margin",
    "MaxRatioJump",
    "OutlierRemovingLayer",
    "Race",
    "SelectionContext",
    "SelectionRule",
    "choice_of",
]
