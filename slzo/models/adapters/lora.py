"""LoRA matrices, through peft."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slzo.models.adapters.base import ADAPTER_NAME, Adapter, import_peft
from slzo.models.decoder_layers import find_decoder_layers
from slzo.models.peft_files import LowRank, PeftFiles, lora_files
from slzo.utils.errors import SlzoError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoRAMatrices(Adapter):
    """LoRA matrices and the linear maps that they are added to.

    Attributes:
        rank: Rank of the matrices.
        alpha: Their product is scaled by alpha / rank.
        target_modules: Names of linear maps; ``None`` for peft's default.
        layers: Numbers of the decoder layers.
        seed: Seed of the initial values. A is random and B zero, so that the model is unchanged.
    """

    kind = "lora"
    multiplies = True

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | None
    layers: tuple[int, ...]
    seed: int = 0

    def inject(self, model: PreTrainedModel) -> None:
        peft = import_peft("model.scope LoRA")
        decoder = re.escape(find_decoder_layers(model)[0])
        try:
            config = peft.LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                target_modules=None if self.target_modules is None else list(self.target_modules),
                layers_to_transform=list(self.layers),
                # an image encoder has layers with the same numbers and names
                exclude_modules=rf"(?!{decoder}\.).*",
            )
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would also seed GPUs
                peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
        except ValueError as error:
            reason, inside = one_line(error), f".{self.layers[0]}."
            maps = (
                name
                for name, module in model.named_modules()
                if inside in name and isinstance(module, nn.Linear | Conv1D)
            )
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in maps)) or "q_proj, v_proj"
            raise SlzoError(
                f"model.scope LoRA: {reason}; check model.scope.rank and set model.scope.target_modules to names of linear maps "
                f"of the layers, such as some of [{known}]"
            ) from error
        model.requires_grad_(False).eval()

    def remove(self, model: PreTrainedModel) -> None:
        _unload_lora(model, merge=False)

    def merge(self, model: PreTrainedModel) -> None:
        _unload_lora(model, merge=True)

    def peft_files(self, model: PreTrainedModel) -> PeftFiles:
        matrices = lora_parameters(model)
        first, second = f".lora_A.{ADAPTER_NAME}.weight", f".lora_B.{ADAPTER_NAME}.weight"
        maps = {}
        for path in (name.removesuffix(first) for name in matrices if name.endswith(first)):
            transposed = isinstance(model.get_submodule(f"{path}.base_layer"), Conv1D)
            maps[path] = LowRank(matrices[path + first], matrices[path + second], transposed)
        return lora_files(maps, self.alpha / self.rank)


def lora_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the LoRA matrices by their names in the model."""
    return {
        name: tensor for name, tensor in model.named_parameters() if f".{ADAPTER_NAME}." in name and ".lora_" in name
    }


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has modules of peft, of this adapter or another one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _unload_lora(model: PreTrainedModel, merge: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge()
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
