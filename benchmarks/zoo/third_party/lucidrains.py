"""The einops school: vit-pytorch, x-transformers and their many sisters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.zoo.third_party.spec import image, noise, row, tokens

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Entry

VIT: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 2, "heads": 2,
    "mlp_dim": 64,
}  # fmt: skip
SMALL = {**VIT, "dim_head": 16}
VOLUME: dict[str, Any] = {
    "image_size": 16, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2, "num_classes": 10,
    "dim": 32, "mlp_dim": 64, "heads": 2, "dim_head": 16,
}  # fmt: skip
STAGES: dict[str, Any] = {"num_classes": 10, "dim": 16, "depth": (1, 1), "heads": (1, 2)}


def vit_entries() -> Iterator[Entry]:
    """Every vision transformer of vit-pytorch that takes one picture."""
    plain = (
        ("simple_vit", "SimpleViT"), ("deepvit", "DeepViT"), ("parallel_vit", "ViT"), ("vit", "ViT"),
        ("vit_for_small_dataset", "ViT"), ("learnable_memory_vit", "ViT"), ("rvt", "RvT"),
        ("simple_vit_with_value_residual", "SimpleViT"),
        ("normalized_vit", "nViT"), ("vit_with_patch_merger", "ViT"), ("jumbo_vit", "JumboViT"),
        ("vit_with_patch_dropout", "ViT"), ("simple_vit_with_patch_dropout", "SimpleViT"),
        ("simple_vit_with_qk_norm", "SimpleViT"), ("simple_vit_with_register_tokens", "SimpleViT"),
        ("simple_vit_with_fft", "SimpleViT"),
        ("simple_uvit", "SimpleUViT"),
        ("vit_with_decorr", "ViT"), ("vit_5", "ViT"),
        ("simple_vit_orthog_residual_update", "SimpleViT"), ("vit_with_keel_post_ln", "ViT"),
        ("simple_vit_with_relative_proj_pos_bias", "SimpleViT"),
        ("simple_vit_with_specialized_cls", "SimpleViT"),
    )  # fmt: skip
    for module, name in plain:
        extra: dict[str, Any] = {"freq_patch_size": 8} if module.endswith("fft") else {}
        tags = ("declinable",) if name == "DeepViT" else ()
        yield row(
            "vit-pytorch",
            module,
            f"vit_pytorch.{module}:{name}",
            {**SMALL, **extra},
            image(),
            *tags,
        )
    yield from _staged()


def _staged() -> Iterator[Entry]:
    picture, large = image(), image(side=64)
    own = {"s1_emb_dim": 16, "s2_emb_dim": 32, "s3_emb_dim": 64, "num_classes": 10}
    rows: tuple[tuple[str, str, dict[str, Any], Any, tuple[str, ...]], ...] = (
        ("cait", "CaiT", {**SMALL, "cls_depth": 1}, picture, ("declinable",)),
        ("xcit", "XCiT", {**SMALL, "cls_depth": 1}, picture, ("ambiguous",)),
        ("pit", "PiT", {**SMALL, "depth": (1, 1)}, picture, ()),
        ("levit", "LeViT", {"image_size": 64, "num_classes": 10, "dim": (32, 48), "depth": 1, "heads": (2, 3), "mlp_mult": 2, "stages": 2}, large, ()),
        ("cvt", "CvT", {**own, "s2_depth": 1, "s3_depth": 1}, large, ()),
        ("twins_svt", "TwinsSVT", {**own, "s4_emb_dim": 64, "s1_local_patch_size": 4, "s1_global_k": 4, "s2_local_patch_size": 4, "s2_global_k": 4, "s3_local_patch_size": 4, "s3_global_k": 4, "s4_local_patch_size": 2, "s4_global_k": 2, "s3_depth": 1, "s4_depth": 1}, large, ()),
        ("crossformer", "CrossFormer", {"dim": (32, 32, 32, 64), "depth": (1, 1, 1, 1), "global_window_size": (4, 2, 2, 1), "local_window_size": 2, "num_classes": 10}, large, ()),
        ("regionvit", "RegionViT", {"dim": (16, 32, 32, 64), "depth": (1, 1, 1, 1), "window_size": 4, "num_classes": 10}, image(side=128), ()),
        ("scalable_vit", "ScalableViT", {**STAGES, "reduction_factor": (4, 2), "window_size": (4, None)}, large, ()),
        ("max_vit", "MaxViT", {"num_classes": 10, "dim": 32, "depth": (1, 1), "dim_head": 16, "window_size": 4}, large, ()),
        ("max_vit_with_registers", "MaxViT", {"num_classes": 10, "dim": 32, "depth": (1, 1), "dim_head": 16, "window_size": 4}, large, ()),
        ("nest", "NesT", {"image_size": 32, "patch_size": 4, "num_classes": 10, "dim": 16, "heads": 1, "num_hierarchies": 2, "block_repeats": (1, 1), "dim_head": 16}, picture, ()),
        ("mobile_vit", "MobileViT", {"image_size": (64, 64), "dims": [16, 24, 32], "channels": [8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64], "num_classes": 10}, large, ()),
        ("cross_vit", "CrossViT", {"image_size": 32, "num_classes": 10, "sm_dim": 16, "lg_dim": 32, "sm_patch_size": 4, "lg_patch_size": 8, "sm_enc_heads": 2, "lg_enc_heads": 2, "lg_enc_depth": 1, "cross_attn_heads": 2, "cross_attn_depth": 1, "depth": 1, "sm_enc_mlp_dim": 32, "lg_enc_mlp_dim": 32}, picture, ()),
        ("t2t", "T2TViT", {"image_size": 32, "num_classes": 10, "dim": 32, "depth": 1, "heads": 2, "mlp_dim": 64, "t2t_layers": ((3, 2), (3, 2))}, picture, ()),
        ("ats_vit", "ViT", {**SMALL, "max_tokens_per_depth": (12, 6)}, picture, ("declinable", "random")),
        ("look_vit", "LookViT", {"dim": 32, "image_size": 48, "num_classes": 10, "depth": 1, "heads": 2, "dim_head": 16, "cross_attn_heads": 2, "cross_attn_dim_head": 16}, image(side=48), ()),
        ("cct", "CCT", {"img_size": 32, "embedding_dim": 32, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 10}, picture, ()),
        ("efficient", "ViT", {}, picture, ()),
    )  # fmt: skip
    for module, name, arguments, inputs, tags in rows:
        if module != "efficient":
            yield row(
                "vit-pytorch", module, f"vit_pytorch.{module}:{name}", arguments, inputs, *tags
            )
    yield row("vit-pytorch", "vit_1d", "vit_pytorch.vit_1d:ViT",
              {"seq_len": 64, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64},
              noise((2, 3, 64)))  # fmt: skip
    yield row(
        "vit-pytorch",
        "vit_3d",
        "vit_pytorch.vit_3d:ViT",
        {**VOLUME, "depth": 2},
        noise((2, 3, 4, 16, 16)),
    )
    yield row("vit-pytorch", "vivit", "vit_pytorch.vivit:ViViT",
              {**VOLUME, "spatial_depth": 1, "temporal_depth": 1}, noise((2, 3, 4, 16, 16)))  # fmt: skip
    yield row(
        "vit-pytorch",
        "simple_vit_3d",
        "vit_pytorch.simple_vit_3d:SimpleViT",
        {**VOLUME, "depth": 2},
        noise((2, 3, 4, 16, 16)),
    )


X_FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flash": {"attn_flash": True},
    "rotary": {"rotary_pos_emb": True},
    "rotary-xpos": {"rotary_xpos": True},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "t5-bias": {"rel_pos_bias": True},
    "dynamic-bias": {"dynamic_pos_bias": True},
    "qk-norm": {"attn_qk_norm": True},
    "qk-norm-dim-scale": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "qk-rmsnorm": {"attn_qk_rmsnorm": True},
    "one-kv-head": {"attn_one_kv_head": True},
    "kv-heads": {"attn_kv_heads": 1},
    "memory-kv": {"attn_num_mem_kv": 3},
    "zero-kv": {"attn_add_zero_kv": True},
    "learned-sink": {"attn_head_learned_sink": True},
    "talking-pre": {"attn_pre_talking_heads": True},
    "talking-post": {"attn_post_talking_heads": True},
    "head-scale": {"attn_head_scale": True},
    "top-k": {"attn_sparse_topk": 4},
    "gate-values": {"attn_gate_values": True},
    "gate-value-heads": {"attn_gate_value_heads": True},
    "on-attention": {"attn_on_attn": True},
    "max-past": {"attn_max_attend_past": 4},
    "l2-distance": {"attn_l2_distance": True},
    "sigmoid": {"attn_sigmoid": True},
    "selective": {"attn_selective": True},
    "cog-signed": {"attn_cog_signed": True},
    "hard": {"attn_hard": True},
    "softclamp": {"attn_softclamp_logits": True},
    "data-alibi": {"attn_data_dependent_alibi": True},
    "cope": {"attn_use_cope": True},
    "laser": {"attn_laser": True},
    "latent-kv": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 16},
    "latent-q": {"attn_use_latent_q": True, "attn_dim_latent_q": 16},
    "value-residual": {"add_value_residual": True},
    "residual-attention": {"residual_attn": True},
    "rel-proj-bias": {"attn_use_rel_proj_pos_bias": True},
    "sandwich": {"sandwich_norm": True},
    "macaron": {"macaron": True},
    "shift-tokens": {"shift_tokens": 1},
    "weight-tied": {"weight_tie_layers": True},
    "polar": {"polar_pos_emb": True},
}
X_DECLINABLE = {
    "talking-post", "cog-signed", "hard", "selective", "top-k", "residual-attention", "laser", "cope",
}  # fmt: skip


def x_entries() -> Iterator[Entry]:
    """x-transformers with each of its switches, as decoder; some as encoder."""

    def arguments(flags: dict[str, Any], causal: bool) -> Any:
        def make() -> dict[str, Any]:
            from x_transformers import Decoder, Encoder

            layers = (Decoder if causal else Encoder)(
                dim=32, depth=2, heads=2, attn_dim_head=16, **flags
            )
            return {"num_tokens": 50, "max_seq_len": 16, "attn_layers": layers}

        return make

    for name, flags in X_FLAGS.items():
        tags = ("declinable",) if name in X_DECLINABLE else ()
        yield row("x-transformers", f"decoder-{name}", "x_transformers:TransformerWrapper",
                  arguments(flags, True), tokens(12), *tags)  # fmt: skip
    for name in (
        "plain",
        "alibi",
        "t5-bias",
        "qk-norm",
        "memory-kv",
        "rotary",
        "flash",
        "dynamic-bias",
    ):
        yield row("x-transformers", f"encoder-{name}", "x_transformers:TransformerWrapper",
                  arguments(X_FLAGS[name], False), _with_mask)  # fmt: skip


def _with_mask() -> dict[str, Any]:
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, -3:] = False
    return {"x": torch.randint(1, 50, (2, 12)), "mask": mask}


HEADS: dict[str, Any] = {"heads": 2, "dim_head": 16}
LM: dict[str, Any] = {"num_tokens": 50, "dim": 32, "max_seq_len": 32}


def sister_entries() -> Iterator[Entry]:
    """One or a few entries for each of the smaller packages."""
    sequence, ids = noise((2, 16, 32)), tokens(16)
    latent = {
        "num_latents": 6,
        "latent_dim": 32,
        "latent_heads": 2,
        "latent_dim_head": 16,
        "cross_dim_head": 16,
    }
    rows: tuple[tuple[str, str, str, dict[str, Any], Any, tuple[str, ...]], ...] = (
        ("perceiver-pytorch", "perceiver", "perceiver_pytorch:Perceiver", {**latent, "num_freq_bands": 2, "depth": 2, "max_freq": 4.0, "num_classes": 10}, noise((2, 8, 8, 3)), ()),
        ("perceiver-pytorch", "perceiver-io", "perceiver_pytorch:PerceiverIO", {**latent, "depth": 1, "dim": 32, "queries_dim": 24, "logits_dim": 5}, _perceiver_io, ()),
        ("local-attention", "mha", "local_attention:LocalMHA", {"dim": 32, "window_size": 8, **HEADS}, sequence, ()),
        ("local-attention", "mha-causal", "local_attention:LocalMHA", {"dim": 32, "window_size": 8, "causal": True, **HEADS}, sequence, ()),
        ("local-attention", "mha-qk-norm", "local_attention:LocalMHA", {"dim": 32, "window_size": 8, "causal": True, "qk_rmsnorm": True, **HEADS}, sequence, ()),
        ("local-attention", "mha-exact", "local_attention:LocalMHA", {"dim": 32, "window_size": 8, "causal": True, "exact_windowsize": True, **HEADS}, sequence, ()),
        ("local-attention", "transformer", "local_attention:LocalTransformer", {**LM, "depth": 2, "local_attn_window_size": 8, **HEADS}, ids, ()),
        ("slot-attention", "slots", "slot_attention:SlotAttention", {"num_slots": 4, "dim": 32, "iters": 2}, sequence, ("negative", "random")),
        ("nystrom-attention", "layer", "nystrom_attention:NystromAttention", {"dim": 32, "num_landmarks": 4, **HEADS}, sequence, ("ambiguous",)),
        ("nystrom-attention", "former", "nystrom_attention:Nystromformer", {"dim": 32, "depth": 2, "num_landmarks": 4, **HEADS}, sequence, ("ambiguous",)),
        ("axial-attention", "layer", "axial_attention:AxialAttention", {"dim": 32, "dim_index": 1, "heads": 2}, noise((2, 32, 6, 6)), ()),
        ("axial-attention", "transformer", "axial_attention:AxialImageTransformer", {"dim": 32, "depth": 1, "heads": 2, "reversible": False}, noise((2, 32, 6, 6)), ()),
        ("memory-efficient-attention-pytorch", "attention", "memory_efficient_attention_pytorch:Attention", {"dim": 32, "causal": True, **HEADS}, sequence, ()),
        ("memory-efficient-attention-pytorch", "chunked", "memory_efficient_attention_pytorch:Attention", {"dim": 32, "causal": True, "memory_efficient": True, "q_bucket_size": 8, "k_bucket_size": 8, **HEADS}, sequence, ("declinable",)),
        ("memory-efficient-attention-pytorch", "cosine", "memory_efficient_attention_pytorch:CosineSimAttention", {"dim": 32, "seq_len": 16, **HEADS}, sequence, ()),
        ("routing-transformer", "lm", "routing_transformer:RoutingTransformerLM", {**LM, "depth": 1, "window_size": 8, "causal": True, **HEADS}, ids, ("declinable", "random")),
        ("sinkhorn-transformer", "lm", "sinkhorn_transformer:SinkhornTransformerLM", {**LM, "depth": 1, "bucket_size": 8, "heads": 2}, ids, ("declinable",)),
        ("sinkhorn-transformer", "lm-causal", "sinkhorn_transformer:SinkhornTransformerLM", {**LM, "depth": 1, "bucket_size": 8, "heads": 2, "causal": True}, ids, ("declinable",)),
        ("linear-attention-transformer", "lm", "linear_attention_transformer:LinearAttentionTransformerLM", {**LM, "depth": 2, **HEADS}, ids, ("negative",)),
        ("linear-attention-transformer", "lm-local", "linear_attention_transformer:LinearAttentionTransformerLM", {**LM, "depth": 1, "n_local_attn_heads": 1, "local_attn_window_size": 8, **HEADS}, ids, ()),
        ("performer-pytorch", "lm", "performer_pytorch:PerformerLM", {**LM, "depth": 1, **HEADS}, ids, ("negative",)),
        ("performer-pytorch", "lm-local", "performer_pytorch:PerformerLM", {**LM, "depth": 1, "local_attn_heads": 1, "local_window_size": 8, **HEADS}, ids, ()),
        ("tab-transformer-pytorch", "tab", "tab_transformer_pytorch:TabTransformer", {"categories": (5, 4, 3), "num_continuous": 4, "dim": 32, "depth": 2, "heads": 2}, _table, ()),
        ("tab-transformer-pytorch", "ft", "tab_transformer_pytorch:FTTransformer", {"categories": (5, 4, 3), "num_continuous": 4, "dim": 32, "depth": 2, "heads": 2}, _table, ()),
        ("megabyte-pytorch", "bytes", "MEGABYTE_pytorch:MEGABYTE", {"num_tokens": 50, "dim": (32, 16), "depth": (1, 1), "max_seq_len": (4, 4), **HEADS}, tokens(16), ()),
        ("block-recurrent-transformer-pytorch", "lm", "block_recurrent_transformer_pytorch:BlockRecurrentTransformer", {"num_tokens": 50, "dim": 32, "depth": 2, "max_seq_len": 16, "block_width": 8, "recurrent_layers": (1,), **HEADS}, ids, ()),
        ("hourglass-transformer-pytorch", "lm", "hourglass_transformer_pytorch:HourglassTransformerLM", {**LM, "depth": (1, 1, 1), "shorten_factor": 2, **HEADS}, ids, ()),
        ("flamingo-pytorch", "resampler", "flamingo_pytorch:PerceiverResampler", {"dim": 32, "depth": 1, "num_latents": 4, **HEADS}, noise((2, 3, 8, 32)), ()),
        ("coca-pytorch", "coca", "coca_pytorch.coca_pytorch:CoCa", {"dim": 32, "num_tokens": 50, "unimodal_depth": 1, "multimodal_depth": 1, "image_dim": 32, "num_img_queries": 4, **HEADS}, _coca, ()),
        ("x-clip", "clip", "x_clip:CLIP", {"dim_text": 32, "dim_image": 32, "dim_latent": 16, "num_text_tokens": 50, "text_enc_depth": 1, "text_seq_len": 16, "text_heads": 2, "visual_enc_depth": 1, "visual_heads": 2, "visual_image_size": 32, "visual_patch_size": 8}, _clip, ()),
        ("reformer-pytorch", "lm", "reformer_pytorch:ReformerLM", {**LM, "depth": 1, "heads": 2, "bucket_size": 4, "n_hashes": 2, "causal": True, "ff_chunks": 1}, ids, ("declinable", "random")),
        ("reformer-pytorch", "lm-full", "reformer_pytorch:ReformerLM", {**LM, "depth": 1, "heads": 2, "bucket_size": 4, "n_hashes": 2, "causal": True, "ff_chunks": 1, "use_full_attn": True}, ids, ("declinable",)),
        ("conformer", "conformer", "conformer:Conformer", {"dim": 32, "depth": 1, "conv_kernel_size": 7, **HEADS}, sequence, ()),
        ("lambda-networks", "layer", "lambda_networks:LambdaLayer", {"dim": 32, "dim_k": 8, "r": 3, "heads": 2, "dim_out": 32}, noise((2, 32, 8, 8)), ("negative",)),
        ("lambda-networks", "global", "lambda_networks:LambdaLayer", {"dim": 32, "dim_k": 8, "n": 8, "heads": 2, "dim_out": 32}, noise((2, 32, 8, 8)), ("negative",)),
        ("g-mlp-pytorch", "gmlp", "g_mlp_pytorch:gMLP", {"num_tokens": 50, "dim": 32, "depth": 2, "seq_len": 16}, ids, ("negative",)),
        ("g-mlp-pytorch", "gmlp-tiny-attention", "g_mlp_pytorch:gMLP", {"num_tokens": 50, "dim": 32, "depth": 2, "seq_len": 16, "attn_dim": 16}, ids, ()),
        ("simple-hierarchical-transformer", "lm", "simple_hierarchical_transformer:HierarchicalTransformer", {"num_tokens": 50, "dim": 32, "depth": 2, "seq_len": 16, "hierarchies": 1, **HEADS}, ids, ()),
        ("st-moe-pytorch", "moe", "st_moe_pytorch:MoE", {"dim": 32, "num_experts": 4}, sequence, ("negative", "random")),
        ("soft-moe-pytorch", "moe", "soft_moe_pytorch:SoftMoE", {"dim": 32, "seq_len": 16, "num_experts": 4}, sequence, ("ambiguous",)),
        ("enformer-pytorch", "enformer", "enformer_pytorch:Enformer.from_hparams", {"dim": 96, "depth": 1, "heads": 2, "target_length": 8, "num_downsamples": 3}, _dna, ()),
        ("titok-pytorch", "tokenizer", "titok_pytorch:TiTokTokenizer", {"dim": 32, "image_size": 32, "patch_size": 8, "num_latent_tokens": 4, "enc_depth": 1, "enc_heads": 2, "enc_dim_head": 16, "dec_depth": 1, "dec_heads": 2, "dec_dim_head": 16, "codebook_size": 16}, image(), ()),
        ("denoising-diffusion-pytorch", "unet", "denoising_diffusion_pytorch:Unet", {"dim": 16, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8, "flash_attn": False}, _timed(3, 16), ()),
        ("denoising-diffusion-pytorch", "unet-full", "denoising_diffusion_pytorch:Unet", {"dim": 16, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8, "full_attn": True, "flash_attn": False}, _timed(3, 16), ()),
        ("product-key-memory", "pkm", "product_key_memory:PKM", {"dim": 32, "heads": 2, "num_keys": 8, "topk": 4, "dim_head": 16}, sequence, ("negative",)),
        ("colt5-attention", "routed", "colt5_attention:ConditionalRoutedAttention", {"dim": 32, "num_heavy_tokens_q": 4, "num_heavy_tokens_kv": 4, "light_dim_head": 16, "light_heads": 2, "light_window_size": 8, "heavy_dim_head": 16, "heavy_heads": 2}, sequence, ()),
    )  # fmt: skip
    for package, name, path, arguments, inputs, tags in rows:
        yield row(package, name, path, arguments, inputs, *tags)


def _perceiver_io() -> dict[str, Any]:
    return {"data": torch.randn(2, 12, 32), "queries": torch.randn(5, 24)}


def _table() -> tuple[Any, ...]:
    return torch.randint(0, 3, (2, 3)), torch.randn(2, 4)


def _coca() -> dict[str, Any]:
    return {"text": torch.randint(1, 50, (2, 12)), "image_tokens": torch.randn(2, 9, 32)}


def _clip() -> tuple[Any, ...]:
    return torch.randint(1, 50, (2, 16)), torch.randn(2, 3, 32, 32)


def _dna() -> tuple[Any, ...]:
    return (torch.randint(0, 4, (1, 256)),)


def _timed(channels: int, side: int) -> Any:
    return lambda: (torch.randn(2, channels, side, side), torch.tensor([3, 7]))


def entries() -> Iterator[Entry]:
    """All of the school."""
    yield from vit_entries()
    yield from x_entries()
    yield from sister_entries()
