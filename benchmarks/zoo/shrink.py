"""Tiny Hugging Face configurations: the default one of a class with every size made small.

Sizes are recognised by the names that transformers gives them, so one rule serves hundreds of
architectures: whatever is as wide as the model becomes `WIDTH`, and so on. Sizes that must agree
with each other (a projection with the width it projects to) are in the same rule and stay equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

WIDTH = 32
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8
INNER = 64
LAYERS = 2
VOCAB = 128
POSITIONS = 64
IMAGE = 32
PATCH = 8
MELS = 16

Rule = tuple[str, Any]

WIDTHS = (
    r"(\w+_)?hidden_size|(\w+_)?hidden_dim|d_model|(\w+_)?embed_dim|embedding_size|(\w+_)?embedding_dim"
    r"|n_embd|dim|(\w+_)?projection_dim|(\w+_)?output_dim|out_hidden_size|word_embed_proj_dim"
    r"|pooler_output_size|emb_dim|projection_size|vision_output_dim|adapter_out_dim|output_size"
    r"|encoder_dim|decoder_dim|hidden_width|attention_hidden_size|classifier_proj_size"
    r"|cross_attention_hidden_size|codevector_dim|proj_codevector_dim|d_embed|cond_dim|dim_model"
    r"|(\w+_)?emb_size|qformer_hidden_size|compressor_hidden_size|feat_proj_dim"
)
HEAD_COUNTS = (
    r"(\w+_)?num_attention_heads|(\w+_)?num_heads|n_heads?|(\w+_)?attention_heads|num_head"
    r"|resampler_n_heads|encoder_num_heads|num_self_attention_heads|num_cross_attention_heads"
)
LAYER_COUNTS = (
    r"(\w+_)?num_hidden_layers|(\w+_)?num_layers|n_layers?|(encoder|decoder)_layers|depth|\w+_depth"
    r"|num_(encoder|decoder)_layers|num_layers_(encoder|decoder)|(encoder|decoder)_num_layers|layers"
    r"|num_blocks|num_block|num_self_attends_per_block|num_adapter_layers"
)
RULES: tuple[Rule, ...] = (
    (WIDTHS, WIDTH),
    (r"(\w+_)?head_dim|d_kv|d_head|dim_head|(\w+_)?head_size|(\w+_)?head_width|head_width", HEAD_DIM),
    (r"(\w+_)?num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num", KV_HEADS),
    (r"(?!classifier)(\w+_)?(intermediate_size|ffn_dim|ffn_size|mlp_dim|ffn_hidden_size|d_ff|d_inner"
     r"|n_inner|intermediate_dim|ff_dim|mlp_hidden_size|dim_feedforward|linear_units)", INNER),
    (HEAD_COUNTS, HEADS),
    (r"(\w+_)?vocab_size|input_vocab_size|codebook_size|num_embeddings|vocab_size_\w+", VOCAB),
    (r"(\w+_)?max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|seq_length"
     r"|max_seq_len\w*|max_length|max_text_len|original_max_position_embeddings", POSITIONS),
    (r"(\w+_)?(image_size|img_size|image_resolution)|pretrain_image_size", IMAGE),
    (r"patch_size", PATCH),
    (r"(num_mel_bins|feature_size|n_mels|mel_dim|input_feat_per_channel|num_mels)", MELS),
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_top_k|top_k|num_experts_per_token|moe_k|topk", 2),
    (r"n_group|topk_group|num_expert_group|num_limited_groups", 1),
    (r"n_shared_experts|num_shared_experts|first_k_dense_replace|num_nextn_predict_layers", 1),
    (r"q_lora_rank|kv_lora_rank|rank|\w+_lora_rank|\w+_rank", 16),
    (r"sliding_window(_size)?|attention_window_size|local_attention|attention_chunk_size", 4),
    (r"max_window_layers", 1),
    (r"rotary_dim", 4),
    (r"(\w+_)?num_queries|num_query_tokens|num_latents|resampler_n_latents|num_image_tokens", 6),
    (r"type_vocab_size", 2),
    (r"num_conv_pos_embeddings", 4),
    (r"num_conv_pos_embedding_groups|norm_num_groups|num_groups", 2),
    (r"query_pre_attn_scalar", 8),
    (r"max_2d_position_embeddings", 64),
    (r"(\w+_)?num_frames", 4),
    (r"state_size|mamba_d_state|ssm_state_size|d_state", 8),
    (r"index_topk", 4),
    (r"index_n_heads", 2),
    (r"index_head_dim", 8),
    (r"num_denoising|train_num_points", 6),
    (r"moe_layer_start_index|moe_layer_interval", 1),
    (r"linear_num_(key|value)_heads", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head", 8),
    (r"mamba_expand|expand", 2),
)  # fmt: skip
LISTS: tuple[Rule, ...] = (
    (r"hidden_sizes|embed_dims?|encoder_hidden_sizes|(\w+_)?hidden_sizes|embed_dim_per_stage", "grow"),
    (r"num_attention_heads|num_heads|(\w+_)?num_heads|num_attention_heads_per_stage", "heads"),
    (r"depths?|num_blocks|blocks_per_stage|layers|num_layers|depth_per_stage", "ones"),
    (r"conv_dim|tdnn_dim|stage_out_channels|stage_mid_channels|stage_in_channels|embedding_dims"
     r"|in_channels|out_channels|decoder_in_channels|encoder_in_channels|channels|num_channels_list", "divide"),
)  # fmt: skip
PER_LAYER = (
    "layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers",
    "layer_rope_theta", "indexer_types", "moe_layers", "block_types", "attention_types",
)  # fmt: skip
INDICES = (
    r"\w*(indexes|indices|out_features|global_attn_\w+|mlp_only_layers|global_attention_blocks)"
)


def shrink(config_class: type, *, layers: int = LAYERS, **overrides: Any) -> Any:
    """The class's default configuration, made tiny.

    Args:
        config_class: A `PreTrainedConfig` class.
        layers: Number of layers of each stack.
        **overrides: Values that win over the rules; a dict for a sub-configuration is merged.
    """
    return config_class(**_merge(_shrunk(config_class().to_dict(), layers), overrides))


def _merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = _merge(values[key], value)
        else:
            values[key] = value
    return values


def _shrunk(values: dict[str, Any], layers: int) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in values.items():
        if key in {
            "transformers_version",
            "architectures",
            "torch_dtype",
            "dtype",
            "_name_or_path",
        }:
            continue
        small[key] = _value(key, value, layers)
    _agree(values, small)
    vocab = small.get("vocab_size")
    for key, value in small.items():
        if key.endswith(("token_id", "token_index")) and isinstance(value, int):
            small[key] = _token(key, value, vocab if isinstance(vocab, int) else VOCAB)
    return small


def _agree(values: dict[str, Any], small: dict[str, Any]) -> None:
    """Sizes that follow from others."""
    if values.get("num_key_value_heads") in (None, values.get("num_attention_heads")) and (
        "num_key_value_heads" in values
    ):
        small["num_key_value_heads"] = small.get("num_attention_heads")
    if values.get("head_dim", 0) is None and _is_int(small.get("num_attention_heads")):
        small["head_dim"] = HEAD_DIM
    if "qk_head_dim" in values:
        small["qk_head_dim"] = 2 * HEAD_DIM


def _value(key: str, value: Any, layers: int) -> Any:
    if key == "per_layer_config":
        return {}
    if isinstance(value, dict) and (key.endswith("config") or "model_type" in value):
        return _shrunk(value, layers)
    if isinstance(value, dict) and key.startswith("rope_"):
        return {inner: _rope(inner, setting) for inner, setting in value.items()}
    if key in PER_LAYER and isinstance(value, (list, tuple)):
        return _two_kinds(list(value))[:layers]
    if re.fullmatch(INDICES, key) and isinstance(value, (list, tuple)):
        return None if key.endswith(("out_indices", "out_features")) else [1]
    if isinstance(value, (list, tuple)) and value and all(_is_int(v) for v in value):
        return _listed(key, list(value))
    if _is_int(value) and value > 0:
        if re.fullmatch(LAYER_COUNTS, key):
            return min(value, layers)
        for pattern, to in RULES:
            if re.fullmatch(pattern, key):
                return min(value, to) if pattern != WIDTHS else to
    return value


def _rope(key: str, value: Any) -> Any:
    """Rotary settings that speak of sizes."""
    if isinstance(value, dict):
        return {inner: _rope(inner, setting) for inner, setting in value.items()}
    if key == "mrope_section":
        return [HEAD_DIM // 2 - len(value) + 1, *[1] * (len(value) - 1)]
    if key == "partial_rotary_factor":
        return max(value, 0.5)
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _two_kinds(kinds: list[Any]) -> list[Any]:
    """Two layers that show both kinds of layer, where there are two."""
    other = next((kind for kind in kinds if kind != kinds[0]), kinds[0]) if kinds else None
    return [kinds[0], other] if kinds else kinds


def _listed(key: str, value: list[int]) -> list[int]:
    makers: dict[str, Callable[[], list[int]]] = {
        "grow": lambda: [16 * 2**place for place in range(len(value))],
        "heads": lambda: [min(v, 2**place) for place, v in enumerate(value)],
        "ones": lambda: [min(v, 1) for v in value],
        "divide": lambda: [v // 8 if v % 64 == 0 else v for v in value],
    }
    for pattern, how in LISTS:
        if re.fullmatch(pattern, key):
            return makers[how]()
    return value


def _token(key: str, value: int, vocab: int) -> int:
    """A special token's id inside a small vocabulary; different names stay different tokens."""
    if value < 0:
        return value
    if value < 8:
        return value
    return vocab - 1 - sum(ord(letter) for letter in key.replace("index", "id")) % 24
