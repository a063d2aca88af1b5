"""Tiny twin of a model: the same classes and configuration, with widths, windows and lengths scaled down.

A few dozen tokens exercise in the twin what takes a few thousand in the real model: windows, chunks of attention, and a change
of the rotary frequencies at some length.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from slzo.private.models import attention_of, has_single_layer_sizes, model_from_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 6
"""Sliding window of a twin, in tokens. Other ranges, such as chunks, have 4 to 8 tokens."""

ORIGINAL_LENGTH = 16
"""Original length of a twin's rotary embeddings, in tokens, if they change beyond a length."""

MAX_LENGTH = 64
"""Number of positions of a twin with a fixed number."""

# new value of config fields that hold a positive number
_SIZES_BY_NAMES = {
    "hidden_size n_embd d_model embedding_dim emb_dim embedding_size word_embed_proj_dim input_embedding_size lru_width "
    "output_embedding_size dim_model_base ple_embed_dim encoder_hidden_size embed_dim": 32,
    "num_attention_heads n_head n_heads attention_heads decoder_attention_heads swa_num_attention_heads num_query_groups "
    "linear_num_heads encoder_attention_heads time_step_rank mamba_dt_rank rotary_dim index_block_size": 4,
    "head_dim d_kv d_head dim_head attention_head_size linear_head_dim linear_key_head_dim linear_value_head_dim "
    "qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim swa_v_head_dim mamba_d_head mamba_head_dim kv_channels "
    "mamba_headdim kv_lora_rank global_head_dim index_head_dim laurel_rank adapter_rank hidden_size_per_layer_input "
    "router_hidden_size d_rel gated_norm_rank num_heads n_mamba_heads mamba_n_heads mamba_num_heads attention_chunk_size "
    "chunk_size mamba_chunk_size floor_scale log_scaling_n_floor block_size rel_extent max_inference_chunksize": 8,
    "intermediate_size n_inner ffn_dim ffn_hidden_size dim_ff dff d_inner feed_forward_size intermediate_size_mlp "
    "decoder_ffn_dim shared_intermediate_size dense_intermediate_size encoder_ffn_dim mlp_dim swa_intermediate_size "
    "mamba_d_ssm attention_hidden_size": 64,
    "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size q_lora_rank o_lora_rank qk_head_dim mamba_d_state state_size ssm_state_size "
    "attention_head_dim hc_lowrank loop_gate_rank": 16,
    "sliding_window sliding_window_size swa_window_size window_size attention_window_size local_attention "
    "local_attention_window_len keep_window_size index_topk local_window_size": WINDOW,
    "max_position_embeddings n_positions max_seq_len n_ctx context_length model_max_length": MAX_LENGTH,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
    "vocab_size vocab_size_per_layer_input unpadded_vocab_size": 320,
    # heads of sparse attention; with few heads keys have equal scores, and the choice among them is arbitrary
    "index_n_heads": 32,
    "ngram_vocab_size_base": 997,
}
# upper limit of config fields, which may already be smaller
_MOST_BY_NAMES = {
    "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num": 8,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k n_group num_expert_group num_blocks "
    "linear_num_key_heads mamba_n_groups n_groups mamba_ngroups index_topk_blocks rescale_every": 2,
    "topk_group n_shared_experts num_shared_experts": 1,
}
_SIZES = {name: size for names, size in _SIZES_BY_NAMES.items() for name in names.split()}
_MOST = {name: most for names, most in _MOST_BY_NAMES.items() for name in names.split()}
# pairs of fields whose ratio is kept: grouped-query attention stays grouped
_SHARED = (
    ("num_attention_heads", "num_key_value_heads"),
    ("num_attention_heads", "num_kv_heads"),
    ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ("num_attention_heads", "num_global_key_value_heads"),
    ("linear_num_key_heads", "linear_num_value_heads"),
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_FEWEST_LAYERS = 4


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """Copy a configuration for a model with a few thousand parameters per layer and a layer of each kind."""
    twin = copy.deepcopy(config)
    _shrink(twin)
    return twin


def tiny_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Make the twin of a model: float32, on its device, with random weights so large that every layer matters.

    The model's code may raise any exception if it does not support small sizes.
    """
    attention = attention_of(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed GPUs
        twin = model_from_config(type(model), tiny_config(model.config), torch.float32)
        enlarge(twin)
    if attention != attention_of(twin):
        twin.set_attn_implementation(attention)
    twin.to(model.device)  # type: ignore[arg-type]
    return twin.eval().requires_grad_(False)


@torch.no_grad()
def enlarge(model: PreTrainedModel) -> None:
    """Draw random weights: matrices slightly enlarge their inputs, vectors differ from zeros and ones."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        elif parameter.dim() > 2:
            parameter.normal_(std=0.3)
        else:
            parameter.nan_to_num_().clamp_(-10, 10).add_(torch.randn_like(parameter), alpha=0.1)


def _shrink(config: PretrainedConfig) -> None:
    before = dict(vars(config))
    for value in before.values():
        if isinstance(value, PretrainedConfig):
            _shrink(value)
    # sizes that differ in single layers; config fields cannot be read while these are set
    single = (config.to_dict().get("per_layer_config") if has_single_layer_sizes(config) else None) or {}
    if single:
        config.per_layer_config = None
    num_layers = _shrink_layers(config, before)
    for name, value in vars(config).copy().items():
        if (name in _SIZES or name in _MOST) and name not in _LAYERS:
            setattr(config, name, _resized(name, value))
    for queries, keys in _SHARED:
        if isinstance(before.get(keys), int) and isinstance(before.get(queries), int):
            ratio, heads = before[queries] / before[keys], getattr(config, queries)
            count = heads if ratio == 1 else 2 * heads if ratio < 1 else 1 if before[keys] == 1 else max(1, heads // 2)
            setattr(config, keys, count)
    _shrink_tokens(config, before)
    _shrink_rope(config, before)
    if single:
        config.per_layer_config = {
            int(layer): {
                name: _resized(name, value) * (2 if name == "head_dim" and value > before[name] else 1)
                for name, value in sizes.items()
            }
            for layer, sizes in single.items()
            if int(layer) < num_layers
        }


def _resized(name: str, value: Any) -> Any:
    if isinstance(value, list):  # one value per layer
        return [_resized(name, item) for item in value]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    return _SIZES.get(name, min(value, _MOST.get(name, value)))


def _shrink_tokens(config: PretrainedConfig, before: Mapping[str, Any]) -> None:
    last = _SIZES["vocab_size"] - 1
    for name, value in before.items():
        if name in _TOKENS and value is not None:
            setattr(config, name, [_TOKENS[name]] if isinstance(value, list) else _TOKENS[name])
        elif name.endswith(("_token_id", "_token_index", "_index")) and isinstance(value, int) and value > last:
            setattr(config, name, last)


def _shrink_layers(config: PretrainedConfig, before: Mapping[str, Any]) -> int:
    """Keep the fewest first layers that include each kind of layer; return their number."""
    name = next((name for name in _LAYERS if isinstance(before.get(name), int)), None)
    if name is None:
        return 0
    total = before[name]
    lists = {key: value for key, value in before.items() if isinstance(value, list | tuple) and len(value) == total}
    needed = [_FEWEST_LAYERS]
    for values in lists.values():
        kinds = [str(value) for value in values]
        if len(set(kinds)) < len(kinds):  # otherwise these are layer numbers
            needed.append(max(kinds.index(kind) for kind in set(kinds)) + 1)
    for key, value in before.items():
        if isinstance(value, int) and not isinstance(value, bool) and 1 < value < total:
            if key.endswith(("_period", "_interval", "_pattern", "_step", "_every_n_layers", "group_size")):
                needed.append(value)
            elif key in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
                needed.append(value + 2)
            elif key == "max_window_layers" and not before.get("layer_types"):
                needed.append(value + 1)
    num_layers = max(needed)
    sharing = before.get("num_kv_shared_layers")
    if isinstance(sharing, int) and sharing > 0:  # the last layers reuse keys of earlier layers of their kind
        config.num_kv_shared_layers = min(sharing, num_layers)
        num_layers *= 2
    num_layers = min(total, num_layers)
    setattr(config, name, num_layers)
    for key, values in before.items():
        if key in lists:
            setattr(config, key, values[:num_layers])
        elif key.endswith(("_layers", "_idxs", "_ids")) and isinstance(values, list):
            setattr(config, key, [layer for layer in values if not isinstance(layer, int) or layer < num_layers])
    return int(num_layers)


def rope_entries(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of rotary embeddings: those of all layers, or one entry for each kind of layer."""
    return [rope] if "rope_type" in rope else [entry for entry in rope.values() if isinstance(entry, dict)]


def _shrink_rope(config: PretrainedConfig, before: Mapping[str, Any]) -> None:
    rope = before.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    old, new = (
        sizes.get("head_dim") or (sizes.get("hidden_size") or 1) // (sizes.get("num_attention_heads") or 1)
        for sizes in (before, vars(config))
    )
    for entry in rope_entries(rope):
        if isinstance(entry.get("original_max_position_embeddings"), int):
            entry["original_max_position_embeddings"] = ORIGINAL_LENGTH
        elif entry.get("rope_type") in ("dynamic", "longrope"):
            config.max_position_embeddings = ORIGINAL_LENGTH
        # one entry per rotary frequency; their number depends on the head dimension
        for name in ("short_factor", "long_factor"):
            if isinstance(entry.get(name), list):
                entry[name] = entry[name][: max(1, len(entry[name]) * new // old)]
        sections = entry.get("mrope_section")
        if isinstance(sections, list) or "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
            part = entry.get("partial_rotary_factor") or before.get("partial_rotary_factor") or 1
            total = sum(sections) * new // old if isinstance(sections, list) else int(new * part) // 2
            entry["mrope_section"] = [total // 3, total // 3, total - total // 3 * 2]
