"""Which tensors are tuned; each scope is one small class, and this list registers it."""

from slzo.zo.scopes.activation_subspace import ActivationSubspace
from slzo.zo.scopes.all_parameters import AllParameters
from slzo.zo.scopes.base import Scope, ScopeContext
from slzo.zo.scopes.layer import LayerScope
from slzo.zo.scopes.layers_in_turn import LayersInTurn
from slzo.zo.scopes.lora import LoRA
from slzo.zo.scopes.outlier_channels import OutlierChannels
from slzo.zo.scopes.prefix_tuning import PrefixTuning
from slzo.zo.scopes.random_layers import RandomLayers
from slzo.zo.scopes.smallest_weights import SmallestWeights

__all__ = [
    "ActivationSubspace",
    "AllParameters",
    "LayerScope",
    "LayersInTurn",
    "LoRA",
    "OutlierChannels",
    "PrefixTuning",
    "RandomLayers",
    "Scope",
    "ScopeContext",
    "SmallestWeights",
]
