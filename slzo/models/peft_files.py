"""Adapters as peft keeps them on disk: settings and tensors; made without peft, which needs not be there to write them.

``PeftModel.from_pretrained`` loads the layout, ``adapter_config.json`` and ``adapter_model.safetensors``; vLLM's
``--enable-lora`` takes that of LoRA too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftFiles:
    """Content of the two files.

    Attributes:
        config: Of ``adapter_config.json``, without the name of the base model.
        tensors: Of ``adapter_model.safetensors``, float32, contiguous, on the CPU.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class LowRank:
    """A linear map W (outputs, inputs) that moves to W + scaling * B A.

    Attributes:
        a: Shape (rank, inputs).
        b: Shape (outputs, rank).
        scaling: alpha / rank.
        transposed: Whether the model stores W as (inputs, outputs), as GPT-2 does.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    transposed: bool = False


def lora_files(maps: Mapping[str, LowRank]) -> PeftFiles:
    """A LoRA adapter with one rank and one alpha: smaller ranks are padded with zeros, other scalings go into B.

    Args:
        maps: By the path of the linear map in the model, like ``model.layers.3.mlp.down_proj``; at least one.
    """
    rank = max(pair.a.shape[0] for pair in maps.values())
    scalings = {pair.scaling for pair in maps.values()}
    common = scalings.pop() if len(scalings) == 1 else 1.0
    tensors = {}
    for path, pair in maps.items():
        missing = rank - pair.a.shape[0]
        a, b = pair.a.detach().float().cpu(), pair.b.detach().float().cpu() * (pair.scaling / common)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": common * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "fan_in_fan_out": any(pair.transposed for pair in maps.values()),
        "target_modules": sorted(maps),  # whole paths: no other layer has them
    }
    return PeftFiles(config, tensors)


def prefix_files(states: Tensor, num_layers: int, num_heads: int) -> PeftFiles:
    """A prefix-tuning adapter, which peft alone loads.

    Args:
        states: Shape (tokens, layers * 2 * width), a token's keys and values of each layer, width being heads * head size.
        num_layers: Decoder layers.
        num_heads: Heads of the keys and values.
    """
    width = states.shape[1] // (2 * num_layers)
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": states.shape[0],
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "token_dim": width,
        "encoder_hidden_size": width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    return PeftFiles(config, {"prompt_embeddings": states.detach().float().cpu().contiguous()})
