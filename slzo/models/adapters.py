"""LoRA modules in a model, through peft."""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slzo.errors import SlzoError

_NAME = "slzo"


@dataclass(frozen=True)
class LoRASettings:
    """Where LoRA matrices go.

    Attributes:
        rank: Their rank.
        alpha: Their product is scaled by alpha / rank.
        target_modules: Names of linear maps; ``None`` for peft's choice.
        layers: Decoder layers.
        seed: Of their first values: A random, B zero, so that the model is unchanged.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | None
    layers: tuple[int, ...]
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for checkpoints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


def inject_lora(model: PreTrainedModel, settings: LoRASettings) -> None:
    """Add LoRA matrices to a model, in place.

    Raises:
        SlzoError: peft is missing or finds nothing to adapt.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SlzoError(
            "model.scope LoRA: needs peft, which is not installed; run: pip install 'slzo[peft]'"
        ) from error
    try:
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number works, and MeZO's are whole ones
            target_modules=None if settings.target_modules is None else list(settings.target_modules),
            layers_to_transform=list(settings.layers),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            inject_adapter_in_model(config, model, adapter_name=_NAME)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise SlzoError(
            f"model.scope LoRA: {reason}; check model.scope.rank and set model.scope.target_modules to names of linear maps of "
            "the layers, like [q_proj, v_proj]"
        ) from error
    model.requires_grad_(False).eval()


def adapter_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The matrices by the model's names."""
    return {name: tensor for name, tensor in model.named_parameters() if f".{_NAME}." in name and ".lora_" in name}


def merge_lora(model: PreTrainedModel) -> None:
    """Add the matrices' products to the weights and remove the matrices, in place."""
    _unload(model, merge=True)


def remove_lora(model: PreTrainedModel) -> None:
    """Remove the matrices, in place; the weights stay as they are."""
    _unload(model, merge=False)


def _unload(model: PreTrainedModel, merge: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
