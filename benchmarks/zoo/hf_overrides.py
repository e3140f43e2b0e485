"""What the general rules cannot know of single architectures. These lists only build models."""

from __future__ import annotations

from typing import Any

_THREE_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_HALF_ROTARY = {
    "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0],
}  # fmt: skip
_SERIES = {"prediction_length": 4, "context_length": 8, "label_length": 4, "moving_average": 3}
_ATTENTION_SECOND = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}

_GEMMA3N = {
    "intermediate_size": 64, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.0],
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip

_SAM2_BACKBONE = {
    "hidden_size": 16, "image_size": [64, 64], "window_size_per_stage": [4, 2, 2, 2],
    "num_attention_heads_per_stage": [1, 2, 2, 2],
}  # fmt: skip
_SAM2_VISION = {
    "backbone_config": _SAM2_BACKBONE, "backbone_channel_list": [128, 64, 32, 16],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}  # fmt: skip
_FOUR_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": _ATTENTION_SECOND,
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
    "lilt": {"channel_shrink_ratio": 4, "max_2d_position_embeddings": 64, "hidden_size": 48},
    "data2vec-vision": {"out_indices": [0, 1, 1, 1], "use_relative_position_bias": True},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16, "num_layers": 1, "zero_expert_num": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": _GEMMA3N,
    "perceiver": {"d_model": 16, "num_self_attends_per_block": 1, "num_blocks": 1,
                  "num_cross_attention_heads": 1, "qk_channels": None, "v_channels": None},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "hunyuan_vl": {"text_config": {"rope_parameters": {
        "rope_type": "xdrope", "rope_theta": 1e4, "xdrope_section": [2, 1, 1]}}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 16}},
    "granite_speech5_encoder": {"context_size": 16},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "csm": {"codec_config": {"hidden_size": 32, "upsample_groups": 32}},
    "mimi": {"hidden_size": 32, "upsample_groups": 32, "num_filters": 8},
    "musicgen": {"decoder": {"dropout": 0.0}},
    "seggpt": {"merge_index": 0, "intermediate_hidden_state_indices": [1, 1, 1, 1]},
    "lw_detr": {"backbone_config": {"image_size": 64, "num_windows": 4}},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "glm5_next_text": {"index_topk": 16, "index_kpool": 4},
    "kosmos-2": {"latent_query_num": 4},
    "clap": {"audio_config": {"spec_size": 32, "patch_embeds_hidden_size": 16, "hidden_size": 16,
                              "depths": [1, 1], "num_attention_heads": [2, 2], "window_size": 4}},
    "speecht5": {"num_mel_bins": 16, "speech_decoder_prenet_units": 32},
    "sam": {"vision_config": {"image_size": 64, "patch_size": 16, "num_pos_feats": 16,
                              "global_attn_indexes": [1], "window_size": 2},
            "prompt_encoder_config": {"image_size": 64, "patch_size": 16, "image_embedding_size": 4}},
    "idefics": {"vision_config": {"embed_dim": 32}, "use_resampler": False},
    "rt_detr": {"anchor_image_size": None},
    "sapiens2": {"num_register_tokens": 4},
    "tvp": {"max_img_size": 64, "visual_prompter_apply": "replace", "visual_prompt_size": 8},
    "xlstm": {"num_heads": 2, "head_dim": 16},
    "decision_transformer": {"n_positions": 64, "state_dim": 5, "act_dim": 3, "max_ep_len": 32},
    "cvt": {"embed_dim": [16, 32, 64], "depth": [1, 2, 3], "num_heads": [1, 2, 4]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention"], "n_groups": 2},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"num_mem_blocks": 1, "hybrid_layer_ids": [1], "mamba_headdim": 8, "attention_hidden_size": 64, "attention_head_dim": 16},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "blip-2": {"image_token_index": 120},
    "instructblip": {"image_token_index": 120},
    "instructblipvideo": {"video_token_index": 120, "image_token_index": 120},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "sam2": {"vision_config": _SAM2_VISION, "prompt_encoder_config": {"image_size": 64, "patch_size": 16}},
    "sam2_vision_model": _SAM2_VISION,
    "sam2_hiera_det_model": _SAM2_BACKBONE,
    "mask2former": {"feature_size": 32, "mask_feature_size": 32, "num_attention_heads": 4, "backbone_config": _FOUR_STAGES},
    "oneformer": {"backbone_config": _FOUR_STAGES},
    "gemma3n": {"text_config": _GEMMA3N, "vision_config": {"architecture": "mobilenetv4_conv_small"}},
}  # fmt: skip

# Inputs that no rule guesses, as `hf_inputs` draws them; those that a forward lacks are left out.
INPUTS: dict[str, dict[str, Any]] = {
    "blip_2_qformer": {"query_embeds": "normal 2 6 32", "encoder_hidden_states": "normal 2 10 32"},
    "kosmos-2": {
        "pixel_values": "normal 2 3 32 32",
        "image_embeds_position_mask": [[False, *[True] * 4, *[False] * 5]] * 2,
    },
    "timesfm": {
        "past_values": "normal 2 64",
        "past_values_padding": "zeros 2 64",
        "freq": "zeros 2 1",
    },
    "idefics": {"pixel_values": "normal 2 1 3 32 32", "image_attention_mask": [[[1]] * 10] * 2},
    "speecht5": {"input_values": "normal 2 10 32", "decoder_input_values": "normal 2 6 32"},
    "gemma3n_audio": {"audio_mel": "normal 2 48 128", "audio_mel_mask": [[False] * 48] * 2},
    "musicgen": {"input_ids": "ids 8 10"},
    "musicgen_melody": {"input_ids": "ids 8 10", "encoder_hidden_states": "normal 2 5 32"},
    "instructblipvideo": {"pixel_values": "normal 2 4 3 32 32"},
}  # fmt: skip

SKIPPED: frozenset[str] = frozenset({"dinat", "layoutlmv2", "nat", "timm_backbone", "pe_video"})

# The subset that tests run: one or more of each way of writing attention, quick to trace.
_EAGER = """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neo gpt_neox gptj gpt_bigcode
    bloom falcon mpt opt xglm codegen starcoder2 stablelm olmo2 cohere persimmon gpt_oss deepseek_v3
    llama4_text mixtral granite glm ctrl openai-gpt biogpt nemotron helium doge
    bert roberta albert electra distilbert deberta deberta-v2 mpnet modernbert roformer xlnet layoutlm esm
    mobilebert squeezebert rembert
    t5 bart
    vit deit beit dinov2 swin swinv2 segformer pvt clip siglip timesformer
    wav2vec2 wavlm hubert audio-spectrogram-transformer speech_to_text decision_transformer
    """
_SDPA = "llama mistral qwen2 gpt2 opt bert distilbert modernbert t5 vit clip wav2vec2 deepseek_v3"
_TRAIN = "llama mistral gemma2 gpt2 gpt_oss bloom deepseek_v3 bert deberta-v2 vit swin wav2vec2"
_TWO_LAYERS = (
    "gemma2 gemma3_text gpt_oss llama4_text gpt_neo modernbert exaone4 qwen2_moe swin swinv2 mpt"
)
CI_EAGER = tuple(_EAGER.split())
CI_SDPA = tuple(_SDPA.split())
CI_TRAIN = frozenset(_TRAIN.split())
CI_TWO_LAYERS = frozenset(_TWO_LAYERS.split())
