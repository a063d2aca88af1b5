"""Adapters in peft's file format. Writing them does not need peft.

``PeftModel.from_pretrained`` loads the two files, ``adapter_config.json`` and ``adapter_model.safetensors``. vLLM's
``--enable-lora`` also loads those of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftFiles:
    """Content of the two files of an adapter.

    Attributes:
        config: Content of ``adapter_config.json`` without the name of the base model.
        tensors: Content of ``adapter_model.safetensors``: float32, contiguous, on the CPU.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class LowRank:
    """A low-rank change B A of a linear map, shape (outputs, inputs).

    Attributes:
        a: Matrix A, shape (rank, inputs).
        b: Matrix B, shape (outputs, rank).
        transposed: Whether the model stores W as (inputs, outputs), as GPT-2 does.
    """

    a: Tensor
    b: Tensor
    transposed: bool = False


def lora_files(maps: Mapping[str, LowRank], scaling: float = 1.0) -> PeftFiles:
    """Make a LoRA adapter with one rank; smaller ranks are padded with zeros.

    Args:
        maps: At least one low-rank change, by the path of its linear map, such as ``model.layers.3.mlp.down_proj``.
        scaling: Factor of all changes, alpha / rank.
    """
    rank = max(pair.a.shape[0] for pair in maps.values())
    tensors = {}
    for path, pair in maps.items():
        missing = rank - pair.a.shape[0]
        a, b = (matrix.detach().float().cpu() for matrix in (pair.a, pair.b))
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "fan_in_fan_out": any(pair.transposed for pair in maps.values()),
        "target_modules": sorted(maps),  # full paths do not match other layers
    }
    return PeftFiles(config, tensors)


def prefix_files(states: Tensor, num_layers: int, num_heads: int) -> PeftFiles:
    """Make a prefix-tuning adapter, which only peft loads.

    Args:
        states: Keys and values of each token in each layer, shape (tokens, layers * 2 * width) with width heads * head size.
        num_layers: Number of decoder layers.
        num_heads: Number of key and value heads.
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
