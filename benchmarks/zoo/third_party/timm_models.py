"""timm: one model of every file of its registry, made smaller where its class lets us."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.zoo.third_party.spec import image, row

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Entry

SHRUNK: tuple[dict[str, Any], ...] = (
    {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3},
    {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3},
    {"img_size": 64, "depth": 2},
    {"img_size": 64, "depths": (1, 1, 1, 1)},
    {"depths": (1, 1, 1, 1)},
    {"img_size": 64},
    {},
)

# name of a model -> side of the picture it takes when it cannot be told one, 0: the default
ATTENTION: dict[str, int] = {
    "vit_tiny_patch16_224": 64, "deit_tiny_distilled_patch16_224": 64,
    "vit_base_patch16_siglip_224": 64, "vit_relpos_small_patch16_224": 64, "vit_tiny_r_s16_p8_224": 0,
    "vit_srelpos_small_patch16_224": 64, "vit_relpos_medium_patch16_rpn_224": 64,
    "vit_base_patch16_xp_224": 64, "vit_base_patch16_rpn_224": 64, "vit_base_patch16_clip_224": 64,
    "vit_small_patch16_dinov3": 64, "vit_small_patch14_reg4_dinov2": 64, "vit_wee_patch16_reg1_gap_256": 64,
    "samvit_base_patch16_224": 64, "flexivit_small": 64, "naflexvit_base_patch16_gap": 64,
    "beit_base_patch16_224": 64, "beitv2_base_patch16_224": 64, "eva02_tiny_patch14_224": 64,
    "eva_giant_patch14_224": 64, "cait_xxs24_224": 64, "xcit_nano_12_p16_224": 64, "crossvit_tiny_240": 0,
    "convit_tiny": 64, "tnt_s_legacy_patch16_224": 64, "pit_ti_224": 0, "levit_128s": 0,
    "coat_tiny": 64, "coat_lite_tiny": 64, "visformer_tiny": 64, "volo_d1_224": 64, "twins_pcpvt_small": 64,
    "twins_svt_small": 64, "swin_tiny_patch4_window7_224": 0, "swin_s3_tiny_224": 0,
    "swinv2_tiny_window8_256": 0, "swinv2_cr_tiny_ns_224": 0, "maxvit_nano_rw_256": 0,
    "maxvit_tiny_tf_224": 0, "maxxvit_rmlp_nano_rw_256": 0, "coatnet_pico_rw_224": 0,
    "coatnet_rmlp_nano_rw_224": 0, "mvitv2_tiny": 64, "pvt_v2_b0": 64, "nest_tiny": 64,
    "nest_tiny_jx": 64, "edgenext_xx_small": 64, "mobilevit_xxs": 64, "mobilevitv2_050": 64,
    "efficientformer_l1": 0, "efficientformerv2_s0": 0, "davit_tiny": 64, "gcvit_xxtiny": 0,
    "hiera_tiny_224": 0, "sam2_hiera_tiny": 0, "fastvit_t8": 64, "fastvit_sa12": 64, "repvit_m1": 64,
    "tiny_vit_5m_224": 0, "efficientvit_m0": 0, "efficientvit_b0": 64, "nextvit_small": 64,
    "halonet26t": 0, "botnet26t_256": 0, "eca_botnext26ts_256": 0, "lambda_resnet26t": 0,
    "lambda_resnet26rpt_256": 0, "sehalonet33ts": 0, "lamhalobotnet50ts_256": 0,
    "mobilenetv4_hybrid_medium": 64, "caformer_s18": 64, "vitamin_small_224": 64, "iformer_t": 64,
    "swiftformer_xs": 64, "shvit_s1": 64, "lowformer_b0": 64, "efficientvim_m1": 64, "cpubone_b0": 64,
    "csatv2": 64, "gemma4_vit_base": 0, "qwen3_vit_base": 0, "mobilenetv5_base": 64,
    "resnet50_clip": 0, "vit_intern300m_patch14_448": 64, "vit_small_patch16_gap_224": 64,
    "vit_medium_patch16_rope_reg1_gap_256": 64, "vit_base_mci_224": 0, "deit3_small_patch16_224": 64,
}  # fmt: skip
AMBIGUOUS = {
    "efficientvim_m1",
    "lambda_resnet26rpt_256",
    "xcit_nano_12_p16_224",
    "davit_tiny",
    "edgenext_xx_small",
    "coat_tiny",
    "coat_lite_tiny",
}
MIXED = {"cait_xxs24_224", "convit_tiny"}
NEGATIVE: dict[str, int] = {
    "resnet18": 64, "seresnet18": 64, "ecaresnet26t": 64, "cbam_resnet18": 64, "skresnet18": 64,
    "resnest14d": 64, "gcresnext26ts": 64, "efficientnet_b0": 64, "mixer_s32_224": 224,
    "poolformer_s12": 64, "convnext_atto": 64, "focalnet_tiny_srf": 64, "mambaout_femto": 64,
    "sequencer2d_s": 64, "ghostnet_050": 64, "mobilenetv3_small_050": 64, "regnety_002": 64,
    "vovnet39a": 64, "resmlp_12_224": 224, "gmlp_ti16_224": 224, "starnet_s1": 64, "rdnet_tiny": 64,
    "convformer_s18": 64, "inception_next_atto": 64, "densenet121": 64, "dla34": 64, "hrnet_w18_small": 64,
    "nfnet_l0": 64, "bat_resnext26ts": 256,
}  # fmt: skip


def create(name: str, fused: bool, side: int) -> nn.Module:
    """A registered model, as small as its class allows, with or without fused attention."""
    import timm
    from timm.layers import set_fused_attn

    set_fused_attn(fused)
    for arguments in SHRUNK:
        if not side and "img_size" in arguments:
            continue  # its stages fit only the size that it is made for
        try:
            return timm.create_model(name, pretrained=False, num_classes=10, **arguments)
        except (
            TypeError,
            AssertionError,
            IndexError,
            ValueError,
            RuntimeError,
            AttributeError,
            KeyError,
        ):
            continue
    raise RuntimeError(f"timm cannot create {name}")


class Sized(nn.Module):
    """A model that takes pictures of the side that it was built for."""

    def __init__(self, name: str, fused: bool, side: int) -> None:
        """Build the model."""
        super().__init__()
        self.model = create(name, fused, side)
        self.side = side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of pictures [B, 3, S, S], cut or enlarged to the right side."""
        embed = getattr(self.model, "patch_embed", None)
        size = getattr(embed, "img_size", None) or getattr(self.model, "img_size", None)
        if size is None and not self.side:
            size = self.model.default_cfg["input_size"][1:]
        if size is None:
            size = (self.side, self.side)
        high, wide = size if isinstance(size, (tuple, list)) else (size, size)
        return self.model(nn.functional.interpolate(x, (high, wide)))


def entries() -> Iterator[Entry]:
    """Every attention model eager and some fused, and the negatives."""
    for name, side in ATTENTION.items():
        tags = {"ambiguous"} if name in AMBIGUOUS else {"declinable"} if name in MIXED else set()
        yield _row(name, side, False, *tags)
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"):
        yield _row(name, ATTENTION[name], True)
    for name, side in NEGATIVE.items():
        yield _row(name, side, False, "negative")


def _row(name: str, side: int, fused: bool, *tags: str) -> Entry:
    label = f"{name}-fused" if fused else name
    path = "benchmarks.zoo.third_party.timm_models:Sized"
    return row(
        "timm", label, path, {"name": name, "fused": fused, "side": side}, image(side=64), *tags
    )
