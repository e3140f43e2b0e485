"""Everything else: CLIP, Whisper, ESM, SAM, MONAI, LitGPT, torchvision, YOLO, ..."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.zoo.third_party.spec import image, noise, row, tokens

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Entry

TEXT = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
HERE = "benchmarks.zoo.third_party.others"


def open_clip_entries() -> Iterator[Entry]:
    """OpenCLIP's towers in their variants."""
    for name, vision, text in (
        ("vit", VISION, TEXT),
        ("resnet", {**VISION, "layers": (1, 1, 1, 1), "image_size": 64}, TEXT),
        ("attentional-pool", {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}, TEXT),
        ("attn-scale", {**VISION, "ls_init_value": 0.1}, {**TEXT, "ls_init_value": 0.1}),
        ("non-causal", VISION, {**TEXT, "no_causal_mask": True}),
    ):
        side = vision["image_size"]
        yield row("open-clip-torch", name, "open_clip.model:CLIP",
                  {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, _pair(side))  # fmt: skip


def _pair(side: int) -> Any:
    return lambda: (torch.randn(2, 3, side, side), torch.randint(1, 59, (2, 16)))


def whisper(**sizes: Any) -> Any:
    """OpenAI's Whisper."""
    from whisper.model import ModelDimensions, Whisper

    return Whisper(ModelDimensions(**sizes))


def esm_model(kind: str, **sizes: Any) -> Any:
    """A protein language model of fair-esm with its alphabet."""
    import esm

    if kind == "esm2":
        return esm.ESM2(alphabet="ESM-1b", **sizes)
    alphabet = esm.data.Alphabet.from_architecture(
        "msa_transformer" if kind == "msa" else "roberta_large"
    )
    options = Namespace(
        arch="msa_transformer" if kind == "msa" else "roberta_large", layers=1, embed_dim=32, logit_bias=True,
        ffn_embed_dim=64, attention_heads=2, max_positions=64, max_tokens=2**10, token_dropout=False,
        embed_positions_msa=True, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        max_tokens_per_msa=2**14, emb_layer_norm_before=True, embed_positions_msa_dim=32,
    )  # fmt: skip
    return (esm.MSATransformer if kind == "msa" else esm.ProteinBertModel)(options, alphabet)


def lit(**sizes: Any) -> Any:
    """A LitGPT model from a configuration."""
    from litgpt import GPT, Config

    return GPT(Config(**sizes))


def curated(kind: str) -> Any:
    """An encoder of curated-transformers."""
    from curated_transformers.models import albert, bert, roberta

    sizes = {"hidden_width": 32, "intermediate_width": 64, "n_attention_heads": 2, "n_hidden_layers": 2,
             "n_pieces": 50, "embedding_width": 32}  # fmt: skip
    if kind == "albert":
        return albert.ALBERTEncoder(albert.ALBERTConfig(**sizes))
    if kind == "roberta":
        return roberta.RoBERTaEncoder(roberta.RoBERTaConfig(**sizes))
    return bert.BERTEncoder(bert.BERTConfig(**sizes))


def old_bert(kind: str) -> Any:
    """The first PyTorch ports, pytorch-pretrained-bert."""
    from pytorch_pretrained_bert import (
        modeling,
        modeling_gpt2,
        modeling_openai,
    )

    if kind == "bert":
        return modeling.BertModel(modeling.BertConfig(50, 32, 2, 2, 64))
    if kind == "gpt2":
        return modeling_gpt2.GPT2Model(modeling_gpt2.GPT2Config(50, 32, 32, 32, 2, 2))
    return modeling_openai.OpenAIGPTModel(modeling_openai.OpenAIGPTConfig(50, 0, 32, 32, 32, 2, 2))


def diffusion_unet(**sizes: Any) -> Any:
    """MONAI's latent diffusion U-Net."""
    from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet(**sizes)


LIT = {
    "block_size": 32,
    "vocab_size": 50,
    "padded_vocab_size": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
}
WHISPER = {
    "n_mels": 8, "n_audio_ctx": 16, "n_audio_state": 32, "n_audio_head": 2, "n_audio_layer": 1,
    "n_vocab": 50, "n_text_ctx": 16, "n_text_state": 32, "n_text_head": 2, "n_text_layer": 1,
}  # fmt: skip
ESM2 = {"num_layers": 2, "embed_dim": 32, "attention_heads": 2}
MONAI_VIT = {"in_channels": 1, "img_size": (16, 16), "patch_size": (4, 4), "hidden_size": 32, "mlp_dim": 64,
             "num_layers": 2, "num_heads": 2, "spatial_dims": 2}  # fmt: skip
LATENT = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (16, 32), "num_res_blocks": 1,
          "attention_levels": (False, True), "norm_num_groups": 8}  # fmt: skip
TOWER = {"image_encoder_dim": 32}
SAM = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "out_chans": 16,
       "use_rel_pos": True, "window_size": 2, "global_attn_indexes": (1,)}  # fmt: skip

Rows = tuple[tuple[str, str, str, dict[str, Any], Any, tuple[str, ...]], ...]
ROWS: Rows = (
    ("openai-whisper", "whisper", f"{HERE}:whisper", WHISPER, lambda: (torch.randn(2, 8, 32), torch.randint(0, 50, (2, 9))), ()),
    ("fair-esm", "esm2", f"{HERE}:esm_model", {"kind": "esm2", **ESM2}, tokens(12, vocabulary=24), ()),
    ("fair-esm", "esm1", f"{HERE}:esm_model", {"kind": "esm1"}, tokens(12, vocabulary=24), ()),
    ("fair-esm", "msa", f"{HERE}:esm_model", {"kind": "msa"}, lambda: (torch.randint(4, 24, (1, 3, 8)),), ()),
    ("segment-anything", "encoder", "segment_anything.modeling:ImageEncoderViT", SAM, image(side=64), ()),
    ("segment-anything", "two-way", "segment_anything.modeling:TwoWayTransformer", {"depth": 1, "embedding_dim": 32, "num_heads": 2, "mlp_dim": 64}, noise((2, 32, 4, 4), (2, 32, 4, 4), (2, 5, 32)), ()),
    ("monai", "vit", "monai.networks.nets:ViT", MONAI_VIT, image(1, 16), ()),
    ("monai", "vit-saved-weights", "monai.networks.nets:ViT", {**MONAI_VIT, "save_attn": True}, image(1, 16), ("declinable",)),
    ("monai", "unetr", "monai.networks.nets:UNETR", {"in_channels": 1, "out_channels": 2, "img_size": (32, 32), "feature_size": 4, "hidden_size": 32, "mlp_dim": 64, "num_heads": 2, "spatial_dims": 2}, image(1, 32), ()),
    ("monai", "swin-unetr", "monai.networks.nets:SwinUNETR", {"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2, "window_size": 4, "depths": (2, 1, 1, 1)}, image(1, 64), ()),
    ("monai", "diffusion-unet", f"{HERE}:diffusion_unet", {**LATENT, "num_head_channels": 8}, lambda: (torch.randn(1, 1, 16, 16), torch.tensor([3])), ()),
    ("monai", "diffusion-unet-conditioned", f"{HERE}:diffusion_unet", {**LATENT, "num_head_channels": 8, "with_conditioning": True, "cross_attention_dim": 24}, lambda: (torch.randn(1, 1, 16, 16), torch.tensor([3]), torch.randn(1, 5, 24)), ()),
    ("monai", "autoencoder-kl", "monai.networks.nets:AutoencoderKL", {**LATENT, "latent_channels": 4}, image(1, 16), ("random",)),
    ("litgpt", "pythia", f"{HERE}:lit", {**LIT, "rotary_percentage": 0.25}, tokens(12), ()),
    ("litgpt", "llama", f"{HERE}:lit", {**LIT, "n_query_groups": 2, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 64, "bias": False, "parallel_residual": False, "rotary_percentage": 1.0}, tokens(12), ()),
    ("litgpt", "gemma2", f"{HERE}:lit", {**LIT, "n_query_groups": 2, "head_size": 8, "norm_class_name": "RMSNorm", "mlp_class_name": "GemmaMLP", "intermediate_size": 64, "bias": False, "rotary_percentage": 1.0, "sliding_window_size": 4, "sliding_window_indices": [1, 0], "attention_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention_scores_scalar": 8}, tokens(12), ()),
    ("litgpt", "multi-query", f"{HERE}:lit", {**LIT, "n_query_groups": 1}, tokens(12), ()),
    ("curated-transformers", "bert", f"{HERE}:curated", {"kind": "bert"}, lambda: {"piece_ids": torch.randint(1, 50, (2, 12)), "attention_mask": _curated_mask()}, ()),
    ("curated-transformers", "roberta", f"{HERE}:curated", {"kind": "roberta"}, lambda: {"piece_ids": torch.randint(1, 50, (2, 12)), "attention_mask": _curated_mask()}, ()),
    ("curated-transformers", "albert", f"{HERE}:curated", {"kind": "albert"}, lambda: {"piece_ids": torch.randint(1, 50, (2, 12)), "attention_mask": _curated_mask()}, ()),
    ("pytorch-pretrained-bert", "bert", f"{HERE}:old_bert", {"kind": "bert"}, lambda: (torch.randint(1, 50, (2, 12)), torch.zeros(2, 12).long(), torch.tensor([[1] * 12, [1] * 9 + [0] * 3])), ()),
    ("pytorch-pretrained-bert", "gpt2", f"{HERE}:old_bert", {"kind": "gpt2"}, tokens(12), ()),
    ("pytorch-pretrained-bert", "openai-gpt", f"{HERE}:old_bert", {"kind": "openai"}, tokens(12), ()),
    ("taming-transformers", "gpt", "taming.modules.transformer.mingpt:GPT", {"vocab_size": 50, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}, tokens(12), ()),
    ("taming-transformers", "gpt-unmasked", "taming.modules.transformer.mingpt:GPT", {"vocab_size": 50, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_unmasked": 4}, tokens(12), ()),
    ("taming-transformers", "unet", "taming.modules.diffusionmodules.model:Model", {"ch": 32, "out_ch": 3, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (8,), "in_channels": 3, "resolution": 16}, lambda: (torch.randn(2, 3, 16, 16), torch.tensor([3, 5])), ()),
    ("torchvision", "vit", "torchvision.models.vision_transformer:VisionTransformer", {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}, image(), ()),
    ("torchvision", "swin", "torchvision.models.swin_transformer:SwinTransformer", {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": [4, 4], "num_classes": 10}, image(), ()),
    ("torchvision", "swin-v2", "benchmarks.zoo.third_party.others:swin_v2", {}, image(), ()),
    ("torchvision", "maxvit", "torchvision.models.maxvit:MaxVit", {"input_size": (64, 64), "stem_channels": 8, "partition_size": 4, "block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8, "stochastic_depth_prob": 0.0, "num_classes": 10}, image(side=64), ()),
    ("torchvision", "resnet", "torchvision.models:resnet18", {}, image(side=64), ("negative",)),
    ("torchvision", "squeezenet", "torchvision.models:squeezenet1_0", {}, image(side=64), ("negative",)),
    ("lightly", "mae", "benchmarks.zoo.third_party.others:lightly_mae", {}, image(), ("random",)),
    ("labml-nn", "alibi", "labml_nn.transformers.alibi:AlibiMultiHeadAttention", {"heads": 2, "d_model": 32}, lambda: {**dict(zip(("query", "key", "value"), [torch.randn(10, 2, 32)] * 3, strict=True)), "mask": torch.ones(10, 10, 1).bool().tril()}, ()),
    ("labml-nn", "unet", "labml_nn.diffusion.ddpm.unet:UNet", {"image_channels": 3, "n_channels": 32, "ch_mults": (1, 2), "is_attn": (False, True), "n_blocks": 1}, lambda: (torch.randn(2, 3, 16, 16), torch.tensor([3, 5])), ()),
    ("kornia", "vit", "kornia.models.vit:VisionTransformer", {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}, image(), ()),
    ("kornia", "tiny-vit", "kornia.models.tiny_vit:TinyViT", {"img_size": 64, "embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_sizes": (4, 4, 4, 2)}, image(side=64), ()),
    ("segmentation-models-pytorch", "unet", "segmentation_models_pytorch:Unet", {"encoder_name": "resnet18", "encoder_weights": None, "decoder_attention_type": "scse"}, image(side=64), ("negative",)),
    ("segmentation-models-pytorch", "segformer", "segmentation_models_pytorch:Segformer", {"encoder_name": "mit_b0", "encoder_weights": None}, image(side=64), ()),
    ("segmentation-models-pytorch", "manet", "segmentation_models_pytorch:MAnet", {"encoder_name": "resnet18", "encoder_weights": None}, image(side=64), ()),
    ("segmentation-models-pytorch", "pan", "segmentation_models_pytorch:PAN", {"encoder_name": "resnet18", "encoder_weights": None}, image(side=128), ("negative",)),
    ("ultralytics", "aifi", "ultralytics.nn.modules:AIFI", {"c1": 32, "cm": 64, "num_heads": 2}, noise((2, 32, 6, 6)), ()),
    ("ultralytics", "c2psa", "ultralytics.nn.modules:C2PSA", {"c1": 128, "c2": 128}, noise((2, 128, 6, 6)), ()),
    ("ultralytics", "a2c2f", "ultralytics.nn.modules:A2C2f", {"c1": 64, "c2": 64, "n": 1, "area": 4}, noise((2, 64, 8, 8)), ()),
    ("ultralytics", "transformer-block", "ultralytics.nn.modules:TransformerBlock", {"c1": 32, "c2": 32, "num_heads": 2, "num_layers": 1}, noise((2, 32, 6, 6)), ()),
    ("ultralytics", "yolo11", "ultralytics.nn.tasks:DetectionModel", {"cfg": "yolo11n.yaml", "verbose": False}, image(side=64), ()),
    ("f5-tts", "dit", "f5_tts.model.backbones.dit:DiT", {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "mel_dim": 8, "text_num_embeds": 20, "text_dim": 16, "conv_layers": 1}, lambda: {"x": torch.randn(2, 12, 8), "cond": torch.randn(2, 12, 8), "text": torch.randint(0, 20, (2, 6)), "time": torch.tensor([0.2, 0.5])}, ()),
)  # fmt: skip


def _curated_mask() -> Any:
    from curated_transformers.layers import AttentionMask

    return AttentionMask(torch.tensor([[1] * 12, [1] * 9 + [0] * 3]).bool())


def swin_v2() -> Any:
    """torchvision's Swin with cosine attention."""
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    return SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=[4, 4],
        num_classes=10, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip


def lightly_mae() -> Any:
    """Lightly's masked autoencoder backbone over torchvision's ViT."""
    from lightly.models.modules import MaskedVisionTransformerTorchvision
    from torchvision.models.vision_transformer import VisionTransformer

    return MaskedVisionTransformerTorchvision(VisionTransformer(32, 8, 2, 2, 32, 64))


def entries() -> Iterator[Entry]:
    """All of them."""
    yield from open_clip_entries()
    for package, name, path, arguments, inputs, tags in ROWS:
        yield row(package, name, path, arguments, inputs, *tags)
