"""Scopes choose the tensors to tune. Each is one file, imported and listed here."""

from slzo.zo.scopes.activation_subspace import ActivationSubspace
from slzo.zo.scopes.all_parameters import AllParameters
from slzo.zo.scopes.base import Scope, ScopeContext, tensors_of
from slzo.zo.scopes.layer import LayerScope
from slzo.zo.scopes.lora import LoRA
from slzo.zo.scopes.outlier_channels import OutlierChannels
from slzo.zo.scopes.prefix_tuning import PrefixTuning
from slzo.zo.scopes.random_layers import RandomLayers
from slzo.zo.scopes.smallest_weights import SmallestWeights

SCOPES = (
    ActivationSubspace,
    AllParameters,
    LayerScope,
    LoRA,
    OutlierChannels,
    PrefixTuning,
    RandomLayers,
    SmallestWeights,
)
"""The scopes that the command line offers by name."""

__all__ = [
    "SCOPES",
    "ActivationSubspace",
    "AllParameters",
    "LayerScope",
    "LoRA",
    "OutlierChannels",
    "PrefixTuning",
    "RandomLayers",
    "Scope",
    "ScopeContext",
    "SmallestWeights",
    "tensors_of",
]
