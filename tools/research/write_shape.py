"""Write a model of a given shape with random weights, to measure memory and time without a download.

    python tools/research/write_shape.py --output DIR                                  # Llama-2-7B: 13.5 GB in bfloat16
    python tools/research/write_shape.py --output DIR --layers 16 --hidden 2048 --inner 5632 --heads 32 --kv_heads 8

The model is a Llama in safetensors, one file per layer, with a tokenizer of single bytes.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

_SPECIAL = ["<unk>", "<s>", "</s>"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description="Write a Llama of a given shape with random weights.")
    parser.add_argument("--output", type=Path, required=True)
    for name, default in (
        ("layers", 32),
        ("hidden", 4096),
        ("inner", 11008),
        ("heads", 32),
        ("kv_heads", 32),
        ("vocabulary", 32000),
        ("positions", 4096),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    return parser.parse_args(arguments)


def write_shape(options: argparse.Namespace) -> int:
    """Write config, tokenizer and weights; return the number of parameters."""
    folder, dtype = options.output, getattr(torch, options.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.positions,
        bos_token_id=1,
        eos_token_id=2,
        dtype=options.dtype,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(options.seed)
    hidden, inner, keys = options.hidden, options.inner, options.kv_heads * options.hidden // options.heads
    index: dict[str, str] = {}
    total = 0

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {
            key: torch.ones(shape, dtype=dtype) if len(shape) == 1 else _random(shape, dtype, generator)
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() for tensor in tensors.values())

    for layer in range(options.layers):
        start = f"model.layers.{layer}."
        save(
            f"layer-{layer:03d}.safetensors",
            {
                f"{start}self_attn.q_proj.weight": (hidden, hidden),
                f"{start}self_attn.k_proj.weight": (keys, hidden),
                f"{start}self_attn.v_proj.weight": (keys, hidden),
                f"{start}self_attn.o_proj.weight": (hidden, hidden),
                f"{start}mlp.gate_proj.weight": (inner, hidden),
                f"{start}mlp.up_proj.weight": (inner, hidden),
                f"{start}mlp.down_proj.weight": (hidden, inner),
                f"{start}input_layernorm.weight": (hidden,),
                f"{start}post_attention_layernorm.weight": (hidden,),
            },
        )
    save(
        "rest.safetensors",
        {
            "model.embed_tokens.weight": (options.vocabulary, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (options.vocabulary, hidden),
        },
    )
    size = total * dtype.itemsize
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return total


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).normal_(0.0, 0.02, generator=generator)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(alphabet) + len(_SPECIAL)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    chosen = parse()
    print(f"{write_shape(chosen):,} parameters in {chosen.output}")
