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
    "num_attention_heads": 1, "num_attention_heads_per_stage": [1, 2, 4, 4],
    "blocks_per_stage": [1, 1, 2, 1], "global_attention_blocks": [3],
}  # fmt: skip
_SAM2_VISION = {
    "backbone_config": _SAM2_BACKBONE, "backbone_channel_list": [128, 64, 32, 16],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}  # fmt: skip
_LAST_THREE = {
    "hidden_sizes": [16, 64, 128, 256], "out_features": ["stage2", "stage3", "stage4"],
    "out_indices": [2, 3, 4],
}  # fmt: skip
_DETECTION = {"backbone_config": _LAST_THREE, "anchor_image_size": None}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_EDGETAM_VISION = {
    "backbone_config": {"architecture": "repvit_m1"},
    "backbone_feature_sizes": [[24, 24], [12, 12], [6, 6]],
}  # fmt: skip
_FOUR_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]}
_UPSAMPLING = {"hidden_size": 32, "upsample_groups": 32}
_PERCEPTION = {
    "architecture": "vit_pe_core_tiny_patch16_384",
    "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": [32, 32]},
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
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 16}},
    "granite_speech5_encoder": {"context_size": 16},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "csm": {"codec_config": {"hidden_size": 32, "upsample_groups": 32}},
    "mimi": {"hidden_size": 32, "upsample_groups": 32, "num_filters": 8},
    "musicgen": {"decoder": {"dropout": 0.0}},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "glm5_next_text": {"index_topk": 16, "index_kpool": 4},
    "kosmos-2": {"latent_query_num": 4},
    "speecht5": {"num_mel_bins": 16, "speech_decoder_prenet_units": 32},
    "idefics": {"vision_config": {"embed_dim": 32}, "use_resampler": False},
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
    "rt_detr": _DETECTION,
    "rt_detr_v2": _DETECTION,
    "d_fine": _DETECTION,
    "deimv2": _DETECTION,
    "pp_doclayout_v4": _DETECTION,
    "sam": {"vision_config": {"image_size": 64, "patch_size": 16, "num_pos_feats": 16, "output_channels": 32, "global_attn_indexes": [1], "window_size": 2}, "prompt_encoder_config": {"image_size": 64, "patch_size": 16, "image_embedding_size": 4}},
    "sam_hq": {"vision_config": {"image_size": 64, "patch_size": 16, "num_pos_feats": 16, "output_channels": 32, "global_attn_indexes": [1], "window_size": 2}, "prompt_encoder_config": {"image_size": 64, "patch_size": 16, "image_embedding_size": 4}, "mask_decoder_config": {"vit_dim": 32}},
    "sam3_tracker": {"vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "backbone_config": {"window_size": 2}}},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4},
    "yolos": {"image_size": [32, 48], "num_detection_tokens": 6},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4}},
    "mistral4": {"rope_parameters": {"partial_rotary_factor": 1.0}},
    "hunyuan_vl_text": {"rope_parameters": _FOUR_ROTARY},
    "hunyuan_vl": {"text_config": {"rope_parameters": _FOUR_ROTARY}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}, "moe_intermediate_size": [64, 64]}},
    "glm_image": {"text_config": {"rope_parameters": _THREE_ROTARY}},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}, "canvas_length": 8},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}},
    "edgetam_vision_model": _EDGETAM_VISION,
    "edgetam": {"vision_config": _EDGETAM_VISION, "prompt_encoder_config": {"image_size": 96, "patch_size": 16}},
    "sapiens2": {"num_register_tokens": 4, "num_key_value_heads_per_layer": [4, 2]},
    "depth_pro": {"intermediate_hook_ids": [1, 0], "intermediate_feature_dims": [16, 16], "scaled_images_feature_dims": [32, 32, 16]},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm5_next": {"text_config": {"index_topk": 16, "index_kpool": 4}},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 32}},
    "pocket_tts": {"flow_head_config": {"condition_dim": 32}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "kyutai_speech_to_text": {"codec_config": _UPSAMPLING},
    "mimi_decoder": _UPSAMPLING,
    "pocket_tts_audio_tokenizer": _UPSAMPLING,
    "pocket_tts_audio_tokenizer_decoder": _UPSAMPLING,
    "bros": {"dim_bbox_projection": 8, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": 127, "IMGIMGBAZ": 100, "IMGIMGBBZ": 101}},
    "lw_detr": {"backbone_config": {"image_size": 64, "num_windows": 4}, "projector_scale_factors": [1.0], "projector_in_channels": [32], "num_feature_levels": 1, "projector_out_channels": 32},
    "xcodec": {"codebook_dim": 64},
    "nemo_speechlm": {"text_config": {"layers_block_type": ["linear_attention", "full_attention"], "n_groups": 2}},
    "pp_doclayout_v3": {"backbone_config": {**_LAST_THREE, "out_features": None, "out_indices": [1, 2, 3, 4]}, "x4_feat_dim": 16},
    "clap": {"audio_config": {"spec_size": 32, "patch_embeds_hidden_size": 16, "hidden_size": 32, "depths": [1, 1], "num_attention_heads": [2, 2], "window_size": 4}},
    "align": {"projection_dim": 80},
    "efficientnet": {"hidden_dim": 2560},
    "seggpt": {"merge_index": 0, "intermediate_hidden_state_indices": [1, 1, 1, 1], "image_size": [32, 16]},
    "encodec": {"codebook_dim": 32},
    "paddleocr_vl": {"text_config": {"rope_parameters": _THREE_ROTARY}},
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minicpmv4_7_vision": {"insert_layer_id": 0},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 100, "vision_end_token_id": 101, "text_config": {"rope_parameters": _THREE_ROTARY}},
    "dots3_note_text": {"head_dim": 16},
    "dots3_note": {"text_config": {"head_dim": 16}, "vision_config": {"adapter_in_dim": 32}, "audio_config": {"adapter_input_size": 32}},
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1]}},
    "blt": {"num_hidden_layers": 2, "encoder_hash_byte_group_vocab": 512, "encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32}},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "neucodec": {"quantization_dim": 64},
    "xcodec2": {"quantization_dim": 64},
    "pe_video_encoder": {"vision_config": _PERCEPTION},
    "pe_audio_video_encoder": {"video_config": {"vision_config": _PERCEPTION}},
    "pe_audio_video": {"audio_video_config": {"video_config": {"vision_config": _PERCEPTION}}},
    "perception_lm": {"vision_config": _PERCEPTION},
    "muse_glimmer_assistant": {"target_layer_ids": [0, 1]},
    "clvp": {"text_config": {"hidden_size": 128}, "speech_config": {"hidden_size": 128}, "decoder_config": {"decoder_fixing_codes": [83, 45, 45, 24]}},
    "mistral_large4_text": {"kv_source_layers": [0, 1]},
    "splinter": {"question_token_id": 104},
    "hgnet_v2": {"hidden_sizes": [16, 64, 128, 256]},
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
    "clvp": {"input_features": "normal 2 16 48"},
    "voxtral_realtime": {"input_features": "normal 2 16 80"},
    "video_llama_3_vision": {"pixel_values": "normal 32 192", "grid_thw": [[1, 4, 4]] * 2, "merge_sizes": [1, 1]},
    "pe_audio": {"input_values": "normal 2 1 7680"},
    "pe_audio_encoder": {"input_values": "normal 2 1 7680"},
    "xcodec": {"input_values": "normal 2 1 1600"},
    "granite_speech5_ctc": {"input_features": "normal 2 48 64"},
    "granite_speech5_encoder": {"input_features": "normal 2 48 64"},
    "depth_pro": {"pixel_values": "normal 2 3 32 32"},
    "nemo_speechlm": {"input_ids": [[3, *[121] * 6, 20, 21, 22]] * 2, "input_features": "normal 2 48 16", "input_features_mask": "ones 2 48"},
    "nemotron3_5_transcribe_audio": {"input_features": "normal 2 48 16", "input_features_mask": "ones 2 48"},
    "splinter": {"input_ids": [[9, 104, 12, 30, 40, 50, 60, 70, 80, 81]] * 2},
    "muse_spark_audio": {"input_values": "normal 2 3840"},
    "muse_glimmer_vision": {"pixel_values": "normal 32 384", "grid_thw": [[1, 4, 4]] * 2},
    "clap": {"input_features": "normal 2 1 64 16", "is_longer": [[False]] * 2},
    "audioflamingo3_encoder": {"input_features": "normal 2 16 128", "input_features_mask": "ones 2 128"},
    "tvp": {"pixel_values": "normal 2 4 3 64 64"},
    "perceiver": {"inputs": "normal 2 10 16"},
    "lightglue": {"pixel_values": "normal 2 2 3 64 64"},
    "pe_audio_video": {"input_values": "normal 2 1 7680", "pixel_values_videos": "normal 2 4 3 32 32"},
    "pe_audio_video_encoder": {"input_values": "normal 2 1 7680", "pixel_values_videos": "normal 2 4 3 32 32"},
    "pe_video_encoder": {"pixel_values_videos": "normal 2 4 3 32 32"},
    "vibevoice_acoustic_tokenizer": {"input_values": "normal 2 1 3200"},
    "encodec": {"input_values": "normal 2 1 1600"},
    "muse_spark_vision": {"pixel_values": "normal 32 384", "grid_thw": [[1, 4, 4]] * 2},
    "qwen3_asr_encoder": {"input_features": "normal 2 16 100", "input_features_mask": "ones 2 100"},
    "fun_asr_nano_encoder": {"input_features": "normal 2 48 112", "input_features_mask": "ones 2 48"},
    "seggpt": {"pixel_values": "normal 2 3 16 16", "prompt_pixel_values": "normal 2 3 16 16", "prompt_masks": "normal 2 3 16 16"},
    "pi0": {"input_ids": [[112] * 16 + [5, 6, 7, 8]] * 2, "attention_mask": "ones 2 20", "pixel_values": "normal 2 1 3 32 32", "pixel_attention_mask": "ones 2 1", "action_embeds": "normal 2 5 32", "state": "normal 2 32", "noise": "normal 2 50 32"},
    "gemma4_audio": {"input_features": "normal 2 48 128"},
    "gemma4_vision": {"pixel_values": "normal 2 36 192", "pixel_position_ids": [[[i % 6, i // 6] for i in range(36)]] * 2},
    "neucodec": {"input_values": "normal 2 1 3200", "input_features": "normal 2 10 160"},
    "xcodec2": {"input_values": "normal 2 1 3200", "input_features": "normal 2 10 160"},
    "minicpm_ocr_vision": {"pixel_values": "normal 1 3 8 256", "target_sizes": [[4, 4]] * 2},
    "minicpmv4_7_vision": {"pixel_values": "normal 1 3 8 256", "target_sizes": [[4, 4]] * 2},
    "paddleocr_vl": {"input_ids": [[5, 126, 112, 112, 112, 112, 109, 6, 7, 8]] * 2, "mm_token_type_ids": [[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]] * 2, "pixel_values": "normal 32 3 8 8", "image_grid_thw": [[1, 4, 4]] * 2},
    "muse_glimmer_assistant": {"noise_embeds": "normal 2 16 32", "context_hidden_states": "normal 2 10 64", "attention_mask": "ones 2 26"},
}  # fmt: skip

# Packages that no machine here has, and models that run on a session and not on tensors.
SKIPPED: frozenset[str] = frozenset(
    [
        "dinat",
        "layoutlmv2",
        "nat",
        "timm_backbone",
        "pe_video",
        "bark",
        "sam2_video",
        "sam3_video",
        "sam3_tracker_video",
        "edgetam_video",
        "higgs_audio_v2_tokenizer",
        "voxtral_realtime_text",
    ]
)

# Classes that refuse `attn_implementation="sdpa"`, or parts of them do.
_NO_SDPA = """
    align autoformer bark big_bird bigbird_pegasus bit blip bloom bridgetower bros canine clap
    clvp codegen convbert convnext convnextv2 cpmant cvt d_fine dab-detr dac deberta deberta-v2
    deepseek_v4 deimv2 dinov3_convnext donut-swin efficientnet encodec falcon_mamba
    fastspeech2_conformer fastspeech2_conformer_with_hifigan flaubert flava flint fnet focalnet
    fsmt funnel gemma2 gemma4_audio git glpn got_ocr2 gpt_neo gpt_neox_japanese gpt_oss gptj
    granite_swa granitemoe_swa grounding-dino groupvit hgnet_v2 hiera hy_v4 ibert imagegpt
    informer inkling2 inkling2_text layoutlmv3 led levit lightglue lilt longformer longt5 luke
    lxmert mamba mamba2 markuplm mask2former maskformer maskformer-swin megatron-bert mgp-str
    mimo_v2_flash mm-grounding-dino mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 mpnet mpt
    mra mvp nllb-moe nystromformer omdet-turbo oneformer openai-gpt openai_privacy_filter
    patchtsmixer pegasus_x perceiver poolformer pp_doclayout_v3 pp_doclayout_v4
    pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_medium_det pp_ocrv6_small_det
    pp_ocrv6_small_rec pp_ocrv6_tiny_rec prophetnet pvt pvt_v2 reformer regnet rembert resnet
    roformer rt_detr rt_detr_v2 rwkv seggpt sew-d speech_to_text speecht5 splinter squeezebert
    swiftformer swin2sr swinv2 switch_transformers t5gemma table-transformer tapas textnet
    time_series_transformer timesformer tvp univnet uvdoc vaultgemma vibevoice
    vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder
    vibevoice_acoustic_tokenizer_encoder vibevoice_asr videoprism videoprism_vision_model vilt
    visual_bert vitdet vits wavlm xcodec xglm xlm xlnet xlstm yoso
    """
NO_SDPA: frozenset[str] = frozenset(_NO_SDPA.split())

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
