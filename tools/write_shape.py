"""Write a model of a given shape with random weights, to measure memory and time without a download.

    python tools/write_shape.py --output DIR                                  # Llama-2-7B: 13.5 GB in bfloat16
    python tools/write_shape.py --output DIR --layers 16 --hidden 2048 --inner 5632 --heads 32 --kv_heads 8

The model is a Llama in safetensors files of at most 500 MB, with a tokenizer of single bytes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from options import option, parse
from slzo.models.shape import skeleton_of
from tiny import make_tokenizer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama; the defaults are those of Llama-2-7B."""

    layers: int = option(32, "number of decoder layers")
    hidden: int = option(4096, "width of the hidden states")
    inner: int = option(11008, "width inside the MLP")
    heads: int = option(32, "attention heads")
    kv_heads: int = option(32, "heads of keys and values")
    vocabulary: int = option(32000, "number of tokens")
    positions: int = option(4096, "largest number of positions")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "type of the weights")

    def config(self) -> LlamaConfig:
        """Return the config of the model."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.positions,
            bos_token_id=1,
            eos_token_id=2,
            dtype=self.dtype,
            architectures=["LlamaForCausalLM"],
        )


@dataclass(frozen=True, kw_only=True)
class Options(Shape):
    """Options of the command."""

    output: Path = option(help="folder to write")
    seed: int = option(0, "seed of the weights")


def write_shape(shape: Shape, folder: Path, seed: int = 0) -> int:
    """Write config, tokenizer and weights; return the number of parameters."""
    config = shape.config()
    config.save_pretrained(folder)
    make_tokenizer(vocabulary=0).save_pretrained(folder)
    tensors = skeleton_of(config).to(getattr(torch, shape.dtype)).state_dict()
    split = split_torch_state_dict_into_shards(tensors, max_shard_size="500MB")
    generator = torch.Generator().manual_seed(seed)
    for file, names in split.filename_to_tensors.items():
        content = {name: _values(tensors[name], generator) for name in names}
        save_file(content, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def _values(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return ones for the weights of a norm, else normal values of the same shape and type."""
    empty = torch.empty_like(like, device="cpu")
    return empty.fill_(1.0) if like.ndim == 1 else empty.normal_(0.0, 0.02, generator=generator)


if __name__ == "__main__":
    chosen = parse(Options, __doc__)
    print(f"{write_shape(chosen, chosen.output, chosen.seed):,} parameters in {chosen.output}")
