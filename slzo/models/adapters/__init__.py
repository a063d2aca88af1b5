"""Modules that a scope adds to a model through peft. Each kind has its own file and is registered here."""

from collections.abc import Mapping
from typing import Any

from slzo.models.adapters.base import Adapter
from slzo.models.adapters.lora import LoRAMatrices
from slzo.models.adapters.virtual_tokens import PrefixTokens

ADAPTERS: Mapping[str, type[Adapter]] = {adapter.kind: adapter for adapter in (LoRAMatrices, PrefixTokens)}


def adapter_from_dict(data: Mapping[str, Any]) -> Adapter:
    """Invert :meth:`Adapter.to_dict`; raise KeyError if the kind is unknown."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"}
    return ADAPTERS[data["kind"]](**values)


__all__ = ["ADAPTERS", "Adapter", "LoRAMatrices", "PrefixTokens", "adapter_from_dict"]
