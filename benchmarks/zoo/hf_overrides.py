"""What the general rules cannot know of single architectures. These lists only build models."""

from __future__ import annotations

from typing import Any

_THREE_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_HALF_ROTARY = {
    "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0],
}  # fmt: skip
_SERIES = {"prediction_length": 4, "context_length": 8}
_ATTENTION_SECOND = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}

OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": _ATTENTION_SECOND,
    "nemotron_h": {"hybrid_override_pattern": "M*"},
    "glm4v": {"text_config": {"rope_parameters": _THREE_ROTARY}},
    "glm46v": {"text_config": {"rope_parameters": _THREE_ROTARY}},
    "glmga": {"text_config": {"rope_parameters": _THREE_ROTARY}},
    "glm4v_text": {"rope_parameters": _THREE_ROTARY},
    "glm4v_moe": {"text_config": {"rope_parameters": _HALF_ROTARY}},
    "glm4v_moe_text": {"rope_parameters": _HALF_ROTARY},
    "glm_image_text": {"rope_parameters": _THREE_ROTARY},
    "glm_ocr": {"text_config": {"rope_parameters": _THREE_ROTARY}},
    "glm_ocr_text": {"rope_parameters": _THREE_ROTARY},
    "qwen2_vl": {"text_config": {"rope_parameters": _THREE_ROTARY}},
    "qwen2_vl_text": {"rope_parameters": _THREE_ROTARY},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _THREE_ROTARY}},
    "qwen2_5_vl_text": {"rope_parameters": _THREE_ROTARY},
    "bridgetower": {
        "num_attention_heads": 4,
        "vision_config": {"hidden_size": 64, "patch_size": 8, "image_size": 32},
    },
    "bros": {"dim_bbox_projection": 8, "dim_bbox_sinusoid_emb_2d": 8, "dim_bbox_sinusoid_emb_1d": 2},
    "moonshine": {
        "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4,
    },
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 2},
    "swin": {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 1],
             "num_heads": [2, 4]},
    "swinv2": {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16,
               "depths": [2, 1], "num_heads": [2, 4]},
    "donut-swin": {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16,
                   "depths": [2, 1], "num_heads": [2, 4]},
    "maskformer-swin": {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16,
                        "depths": [2, 1], "num_heads": [2, 4]},
    "swin2sr": {"image_size": 32, "window_size": 4, "embed_dim": 16, "depths": [2, 1],
                "num_heads": [2, 2]},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 2},
    "esmc": {"num_key_value_heads": 4},
    "cvt": {"embed_dim": [16, 32, 64], "depth": [1, 1, 2], "num_heads": [1, 2, 4]},
    "lilt": {"channel_shrink_ratio": 4, "max_2d_position_embeddings": 64, "hidden_size": 48},
    "data2vec-vision": {"out_indices": [0, 1, 1, 1], "use_relative_position_bias": True},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16, "num_layers": 1, "zero_expert_num": 2},
    "xlm-roberta-xl": {},
}  # fmt: skip

SKIPPED: frozenset[str] = frozenset({"dinat", "layoutlmv2", "nat", "timm_backbone", "pe_video"})

CI_EAGER: frozenset[str] = frozenset()
CI_SDPA: frozenset[str] = frozenset()
