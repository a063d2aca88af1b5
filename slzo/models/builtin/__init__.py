"""The built-in models, which are available without the Hub. Each has its own file and is registered here."""

from collections.abc import Mapping

from slzo.models.builtin.base import BuiltinModel, Licence
from slzo.models.builtin.gemma3_270m import GEMMA3_270M
from slzo.models.builtin.smollm2_135m import SMOLLM2_135M

BUILTIN_MODELS: Mapping[str, BuiltinModel] = {model.name: model for model in (SMOLLM2_135M, GEMMA3_270M)}

__all__ = ["BUILTIN_MODELS", "BuiltinModel", "Licence"]
