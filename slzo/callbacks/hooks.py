"""What the hooks of callbacks get, checked for the types that slzo's callbacks need."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule

from slzo.module import ZOModule
from slzo.utils.errors import SlzoError


def zo_module(module: LightningModule) -> ZOModule:
    """Return the module that a callback's hook was given.

    Raises:
        SlzoError: It is not a ZOModule.
    """
    if not isinstance(module, ZOModule):
        raise SlzoError(
            f"trainer.callbacks: those of slzo need a ZOModule, not a {type(module).__name__}; leave them out"
        )
    return module


def returned(module: LightningModule, hook: str, outputs: Any, name: str) -> Any:
    """Return a value of what a hook of the module returned, for a callback.

    Raises:
        SlzoError: A subclass returns something else.
    """
    if not isinstance(outputs, Mapping) or name not in outputs:
        raise SlzoError(f"{type(module).__name__}.{hook}: callbacks need what super().{hook} returns; return that")
    return outputs[name]
