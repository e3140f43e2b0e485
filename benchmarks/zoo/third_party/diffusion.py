"""diffusers: U-Nets, transformers and autoencoders, with the two kinds of attention processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.zoo.third_party.spec import row

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Entry

GROUPS: dict[str, Any] = {"norm_num_groups": 8}
UNET: dict[str, Any] = {
    **GROUPS, "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
    "block_out_channels": (16, 32), "cross_attention_dim": 24, "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
LAYERS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
VAE: dict[str, Any] = {
    **GROUPS, "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4,
}  # fmt: skip


def _r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _unet_inputs() -> dict[str, Any]:
    return {
        "sample": _r(2, 4, 16, 16),
        "timestep": torch.tensor([5, 9]),
        "encoder_hidden_states": _r(2, 7, 24),
    }


def _masked_inputs() -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {**_unet_inputs(), "encoder_attention_mask": mask}


def _ids(count: int, axes: int = 3) -> torch.Tensor:
    return torch.arange(count)[:, None].expand(count, axes).float()


def _flux() -> dict[str, Any]:
    return {"hidden_states": _r(2, 9, 4), "encoder_hidden_states": _r(2, 5, 24),
            "pooled_projections": _r(2, 12), "timestep": torch.tensor([0.3, 0.7]),
            "img_ids": _ids(9), "txt_ids": _ids(5)}  # fmt: skip


def _video(channels: int = 4, width: int = 24) -> dict[str, Any]:
    return {"hidden_states": _r(1, channels, 2, 8, 8), "timestep": torch.tensor([5]),
            "encoder_hidden_states": _r(1, 6, width)}  # fmt: skip


def _joint(width: int = 24) -> dict[str, Any]:
    return {"hidden_states": _r(2, 4, 8, 8), "encoder_hidden_states": _r(2, 5, width),
            "timestep": torch.tensor([5, 9])}  # fmt: skip


Rows = tuple[tuple[str, dict[str, Any], Callable[[], Any], tuple[str, ...]], ...]

ROWS: Rows = (
    ("UNet2DConditionModel", UNET, _unet_inputs, ()),
    ("UNet2DConditionModel", UNET, _masked_inputs, ("masked",)),
    ("UNet2DModel", {**GROUPS, "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1,
                     "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                     "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
     lambda: {"sample": _r(2, 3, 16, 16), "timestep": torch.tensor([5, 9])}, ()),
    ("AutoencoderKL", VAE, lambda: (_r(2, 3, 16, 16),), ()),
    ("VQModel", {**VAE, "num_vq_embeddings": 16}, lambda: (_r(2, 3, 16, 16),), ()),
    ("DiTTransformer2DModel", {**LAYERS, "in_channels": 4, "sample_size": 8, "norm_num_groups": 2},
     lambda: {"hidden_states": _r(2, 4, 8, 8), "timestep": torch.tensor([5, 9]),
              "class_labels": torch.tensor([1, 2])}, ()),
    ("PixArtTransformer2DModel", {**LAYERS, "in_channels": 4, "out_channels": 8, "sample_size": 8,
                                  "cross_attention_dim": 32, "caption_channels": 24,
                                  "norm_num_groups": 2, "use_additional_conditions": False},
     lambda: {**_joint(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, ()),
    ("SD3Transformer2DModel", {**LAYERS, "sample_size": 8, "in_channels": 4, "joint_attention_dim": 24,
                               "caption_projection_dim": 32, "pooled_projection_dim": 12,
                               "out_channels": 4, "pos_embed_max_size": 8, "num_layers": 2},
     lambda: {**_joint(), "pooled_projections": _r(2, 12)}, ()),
    ("FluxTransformer2DModel", {**LAYERS, "in_channels": 4, "num_single_layers": 1, "joint_attention_dim": 24,
                                "pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8)}, _flux, ()),
    ("ChromaTransformer2DModel", {**LAYERS, "in_channels": 4, "num_single_layers": 1, "joint_attention_dim": 24,
                                  "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8,
                                  "approximator_hidden_dim": 16, "approximator_layers": 1},
     lambda: {key: value for key, value in _flux().items() if key != "pooled_projections"}, ()),
    ("AuraFlowTransformer2DModel", {"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1,
                                    "num_single_dit_layers": 1, "attention_head_dim": 16,
                                    "num_attention_heads": 2, "joint_attention_dim": 24,
                                    "caption_projection_dim": 32, "pos_embed_max_size": 64},
     lambda: {**_joint(), "timestep": torch.tensor([0.2, 0.4])}, ()),
    ("CogVideoXTransformer3DModel", {**LAYERS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
                                     "text_embed_dim": 24, "sample_width": 8, "sample_height": 8,
                                     "sample_frames": 5, "max_text_seq_length": 6},
     lambda: {"hidden_states": _r(1, 2, 4, 8, 8), "encoder_hidden_states": _r(1, 6, 24),
              "timestep": torch.tensor([5])}, ()),
    ("LTXVideoTransformer3DModel", {**LAYERS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32,
                                    "caption_channels": 24},
     lambda: {"hidden_states": _r(2, 8, 4), "encoder_hidden_states": _r(2, 6, 24),
              "timestep": torch.tensor([5, 5]), "encoder_attention_mask": torch.ones(2, 6),
              "num_frames": 2, "height": 2, "width": 2}, ()),
    ("MochiTransformer3DModel", {**LAYERS, "in_channels": 4, "pooled_projection_dim": 24,
                                 "text_embed_dim": 24, "time_embed_dim": 8, "max_sequence_length": 6},
     lambda: {**_video(), "encoder_attention_mask": torch.ones(1, 6).bool()}, ()),
    ("LatteTransformer3DModel", {**LAYERS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32,
                                 "sample_size": 8, "patch_size": 2, "caption_channels": 24,
                                 "norm_type": "ada_norm_single", "num_embeds_ada_norm": 10, "video_length": 2},
     lambda: {**_video(), "timestep": torch.tensor([5])}, ()),
    ("WanTransformer3DModel", {**LAYERS, "in_channels": 4, "out_channels": 4, "text_dim": 24,
                               "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}, _video, ()),
    ("HunyuanVideoTransformer3DModel", {**LAYERS, "in_channels": 4, "out_channels": 4, "num_single_layers": 1,
                                        "num_refiner_layers": 1, "text_embed_dim": 24,
                                        "pooled_projection_dim": 12, "rope_axes_dim": (4, 4, 8),
                                        "guidance_embeds": False},
     lambda: {**_video(), "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
              "pooled_projections": _r(1, 12)}, ()),
    ("CogView4Transformer2DModel", {**LAYERS, "in_channels": 4, "out_channels": 4, "text_embed_dim": 24,
                                    "time_embed_dim": 8, "condition_dim": 4, "rope_axes_dim": (8, 8)},
     lambda: {**_joint(), "original_size": torch.tensor([[8, 8]] * 2),
              "target_size": torch.tensor([[8, 8]] * 2), "crop_coords": torch.zeros(2, 2).long()}, ()),
    ("SanaTransformer2DModel", {**LAYERS, "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2,
                                "cross_attention_head_dim": 16, "cross_attention_dim": 32,
                                "caption_channels": 24, "sample_size": 8}, _joint, ()),
    ("Lumina2Transformer2DModel", {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32,
                                   "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2,
                                   "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 4, 8),
                                   "axes_lens": (32, 32, 32), "cap_feat_dim": 24},
     lambda: {**_joint(), "encoder_attention_mask": torch.ones(2, 5).bool()}, ()),
    ("QwenImageTransformer2DModel", {**LAYERS, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 24,
                                     "axes_dims_rope": (4, 4, 8)},
     lambda: {"hidden_states": _r(2, 16, 4), "encoder_hidden_states": _r(2, 5, 24),
              "encoder_hidden_states_mask": torch.ones(2, 5).long(),
              "timestep": torch.tensor([0.2, 0.5]), "img_shapes": [[(1, 4, 4)]] * 2}, ()),
    ("PriorTransformer", {**LAYERS, "embedding_dim": 24, "num_embeddings": 7, "additional_embeddings": 4},
     lambda: {"hidden_states": _r(2, 24), "timestep": torch.tensor([5, 9]), "proj_embedding": _r(2, 24),
              "encoder_hidden_states": _r(2, 7, 24), "attention_mask": torch.ones(2, 7).bool()}, ()),
    ("UNet3DConditionModel", {key: value for key, value in UNET.items() if "block_types" not in key}
     | {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
     lambda: {"sample": _r(1, 4, 2, 16, 16), "timestep": torch.tensor([5]),
              "encoder_hidden_states": _r(1, 7, 24)}, ()),
    ("UNetMotionModel", {**GROUPS, "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
                         "block_out_channels": (16, 32), "cross_attention_dim": 24, "num_attention_heads": 2,
                         "motion_num_attention_heads": 2, "motion_max_seq_length": 4,
                         "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
                         "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion")},
     lambda: {"sample": _r(1, 4, 2, 16, 16), "timestep": torch.tensor([5]),
              "encoder_hidden_states": _r(2, 7, 24)}, ()),
    ("UNetSpatioTemporalConditionModel", {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": (32, 64), "cross_attention_dim": 24, "num_attention_heads": 2, "num_frames": 2,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "projection_class_embeddings_input_dim": 96, "addition_time_embed_dim": 32},
     lambda: {"sample": _r(1, 2, 4, 16, 16), "timestep": torch.tensor([5.0]),
              "encoder_hidden_states": _r(1, 1, 24), "added_time_ids": _r(1, 3)}, ()),
    ("StableAudioDiTModel", {**LAYERS, "sample_size": 8, "in_channels": 4, "out_channels": 4,
                             "num_key_value_attention_heads": 1, "cross_attention_dim": 24,
                             "cross_attention_input_dim": 24, "time_proj_dim": 16,
                             "global_states_input_dim": 12},
     lambda: {"hidden_states": _r(2, 4, 8), "timestep": torch.tensor([0.2, 0.4]),
              "encoder_hidden_states": _r(2, 5, 24), "global_hidden_states": _r(2, 1, 12),
              "rotary_embedding": (torch.ones(9, 8), torch.zeros(9, 8))}, ()),
    ("UVit2DModel", {"hidden_size": 32, "cond_embed_dim": 24, "micro_cond_encode_dim": 4,
                     "micro_cond_embed_dim": 20, "encoder_hidden_size": 24, "vocab_size": 33,
                     "codebook_size": 32, "in_channels": 32, "block_out_channels": 32, "num_res_blocks": 1,
                     "block_num_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "intermediate_size": 64, "sample_size": 8},
     lambda: {"input_ids": torch.randint(0, 32, (2, 8, 8)), "encoder_hidden_states": _r(2, 7, 24),
              "pooled_text_emb": _r(2, 24), "micro_conds": _r(2, 5)}, ()),
)  # fmt: skip
CLASSIC = {"UNet2DConditionModel", "AutoencoderKL", "UNet3DConditionModel", "PriorTransformer",
           "PixArtTransformer2DModel"}  # fmt: skip


class Classic(nn.Module):
    """A diffusers model with its old processor: baddbmm, softmax, bmm."""

    def __init__(self, kind: str, **arguments: Any) -> None:
        """Build the model and give it the processor."""
        super().__init__()
        import diffusers
        from diffusers.models.attention_processor import AttnProcessor

        self.model = getattr(diffusers, kind)(**arguments)
        self.model.set_attn_processor(AttnProcessor())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model itself gives."""
        return self.model(*args, **kwargs)


def entries() -> Iterator[Entry]:
    """Every model as it comes, and some with the old processor."""
    for kind, arguments, inputs, labels in ROWS:
        name = "-".join([kind, *labels])
        yield row("diffusers", name, f"diffusers:{kind}", arguments, inputs)
        if kind in CLASSIC:
            path = "benchmarks.zoo.third_party.diffusion:Classic"
            yield row("diffusers", f"{name}-classic", path, {"kind": kind, **arguments}, inputs)
