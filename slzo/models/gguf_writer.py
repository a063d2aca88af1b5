"""Writes a GGUF file, for llama.cpp and programs built on it: Llama models with a byte-level BPE tokenizer.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
)
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slzo.errors import SlzoError
from slzo.models.quantization import method_of

_TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


def write_file(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, name: str) -> None:
    """Write weights, in the type of the model's but norms in float32, as llama.cpp has them, and tokenizer.

    Args:
        model: For which :func:`why_not` says nothing, float32, float16 or bfloat16.
        tokenizer: Its tokenizer.
        path: File to write.
        name: What the file calls the model.

    Raises:
        SlzoError: The model has a weight that Llama models have not.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    _add_config(writer, model)
    _add_tokenizer(writer, tokenizer, model.config.vocab_size)
    for tensor_name, tensor in _tensors(model):
        kind, _ = _TYPES[tensor.dtype]
        values = tensor.float().numpy() if kind is GGMLQuantizationType.BF16 else tensor.numpy()
        writer.add_tensor(tensor_name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def why_not(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a model and its tokenizer cannot be written; empty if they can."""
    return _why_not_model(model) or _why_not_tokens(tokenizer)


def _why_not_model(model: PreTrainedModel) -> str:
    """Why a model cannot be written; empty if it can."""
    config: Any = model.config
    if config.model_type != "llama":
        return f"only Llama models are written, and this one is called {config.model_type}"
    if method_of(model) is not None:
        return f"the model is quantized ({method_of(model)})"
    rope = config.rope_parameters["rope_type"]
    if rope != "default":
        return f"its rotary embeddings are scaled ({rope})"
    if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        return "its layers have biases or another activation than silu"
    return ""


def _why_not_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a tokenizer cannot be written; empty if it can."""
    if not tokenizer.is_fast:
        return "its tokenizer has no tokenizer.json"
    known = _backend(tokenizer)
    if known["model"]["type"] != "BPE" or known["normalizer"] is not None or _splitting(known) is None:
        return "its tokenizer is none of byte-level BPE that splits words as GPT-2's or SmolLM's"
    return ""


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))


def _splitting(known: dict[str, Any]) -> str | None:
    """llama.cpp's name for how words are split before BPE."""
    before = known["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    *first, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or not last["use_regex"]:
        return None
    if not first:
        return "gpt-2"
    digits = len(first) == 1 and first[0]["type"] == "Digits" and first[0]["individual_digits"]
    return "smollm" if digits else None


def _add_config(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config: Any = model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(_TYPES[model.dtype][1])


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    known = _backend(tokenizer)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    special = {
        entry["id"]: TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        for entry in known["added_tokens"]
    }
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(known) or "")
    # a model may have more rows than its tokenizer has tokens
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(vocab_size)])
    kinds = [
        special.get(number, TokenType.NORMAL) if number in tokens else TokenType.UNUSED for number in range(vocab_size)
    ]
    writer.add_token_types(kinds)
    merges = known["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights with llama.cpp's names; a head that is tied to the embeddings is left out, as there."""
    config: Any = model.config
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = getattr(config, "tie_word_embeddings", False)
    for path, value in model.state_dict().items():
        name = names.get_name(path, try_suffixes=(".weight",))
        if name is None:
            raise SlzoError(f"format gguf: weight {path!r} has no place in a Llama file; use --format merged")
        if tied and name == "output.weight":
            continue
        tensor = value.detach().cpu()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if path.endswith(f"{part}.weight"):
                tensor = interleaved(tensor, heads)
        yield name, (tensor.float() if tensor.dim() == 1 else tensor).contiguous()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key map in llama.cpp's order.

    Rotary embeddings turn pairs of rows of a head: transformers pairs row i with row i + half, llama.cpp row 2i with row 2i + 1.

    Args:
        weight: ``[heads * head_dim, hidden]``.
        heads: Query or key heads.
    """
    halves = weight.unflatten(0, (heads, 2, -1))  # heads, half, row of the half
    return halves.transpose(1, 2).reshape(weight.shape)
