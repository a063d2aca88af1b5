"""Print the memory that tuning one layer takes on GPUs and CPUs, by model and quantization: the table of docs/memory.md.

    python tools/research/memory_table.py

The sizes of the models are in this file. Nothing is downloaded.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from slzo.models.parts import ModelParts
from slzo.models.shape import ModelShape, shape_of, skeleton_of
from slzo.training.memory_estimate import MemoryInputs, Workload, tuning_bytes
from slzo.zo.optim import OptimizerOptions
from slzo.zo.scopes import LayerScope, ScopeContext

_GB = 2**30
_CARDS = (16, 24, 80)
_RESERVED = 0.5  # GiB of a GPU that its driver and libraries take
_TOKENS = 4096


def _sizes(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


# sizes as published by the authors
MODELS: dict[str, PretrainedConfig] = {
    "Llama-2-7B": LlamaConfig(**_sizes(32000, 4096, 11008, 32, 32, 32)),
    "Qwen3-8B": Qwen3Config(**_sizes(151936, 4096, 12288, 36, 32, 8), head_dim=128),
    "OPT-13B": OPTConfig(
        vocab_size=50272,
        hidden_size=5120,
        ffn_dim=20480,
        num_hidden_layers=40,
        num_attention_heads=40,
        word_embed_proj_dim=5120,
    ),
    "Llama-2-70B": LlamaConfig(**_sizes(32000, 8192, 28672, 80, 64, 8)),
}
QUANTIZATIONS: dict[str, str | None] = {"float16": None, "int8": "int8", "nf4": "nf4"}


def memory_inputs(model: PreTrainedModel, shape: ModelShape, quantization: str | None, on_cpu: bool) -> MemoryInputs:
    """Return the inputs for one layer at a third of the depth: SPSA with one query, SGD, 16 rows of 256 tokens."""
    parts, layer = ModelParts(model, packed=False, onednn=False), shape.num_layers // 3
    tensors = LayerScope().tensors(ScopeContext(parts, layer, lambda _: ()))
    optimizer = OptimizerOptions.of(partial(torch.optim.SGD, lr=1e-3))
    return MemoryInputs(
        shape=shape,
        dtype=torch.bfloat16 if on_cpu else torch.float16,
        quantization=quantization,
        tuned=tuning_bytes(tensors, 1, 1, optimizer),
        full_layers=1,
        start=layer,
        workload=Workload(_TOKENS, 0, 1000 * 256),
        cache_bytes=2 * _GB,
        on_cpu=on_cpu,
    )


def table() -> str:
    """Return the table as Markdown."""
    cards = " | ".join(f"{card} GB GPU" for card in _CARDS)
    lines = [
        f"| model | frozen layers | on a GPU, GiB | {cards} | on a CPU, GiB | of it in files |",
        "|---|---|---:|" + "---|" * len(_CARDS) + "---:|---:|",
    ]
    for name, config in MODELS.items():
        model = skeleton_of(config).to(torch.bfloat16)  # type: ignore[arg-type]
        shape = shape_of(model)
        for word, quantization in QUANTIZATIONS.items():
            card = memory_inputs(model, shape, quantization, on_cpu=False).plan().total / _GB
            own = replace(shape, stored_dtype=torch.bfloat16)
            cpu = memory_inputs(model, own, quantization, on_cpu=True).plan()
            fits = ["yes" if card + _RESERVED <= size * 1e9 / _GB else "no" for size in _CARDS]
            kind = word if quantization else "float16 (CPU: bfloat16)"
            lines.append(
                f"| {name} | {kind} | {card:.1f} | {' | '.join(fits)} | {cpu.total / _GB:.1f} | {cpu.mapped / _GB:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    argparse.ArgumentParser(description="Print the memory table of docs/memory.md.").parse_args(arguments)
    print(table(), end="")


if __name__ == "__main__":
    main()
