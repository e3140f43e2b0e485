"""Decoder models of chosen size with random weights, whose attention the benchmarks compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BY_HAND = "sdpa_by_hand"  # causal attention as an expert would write it for one long prompt


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shape of a decoder."""

    layers: int = 8
    hidden: int = 4096
    intermediate: int = 14336
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def linear_parameters(self) -> int:
        """Weights that every token is multiplied with."""
        heads = 2 * self.query_heads + 2 * self.kv_heads
        return self.layers * self.hidden * (heads * self.head_dim + 3 * self.intermediate)

    def flops(self, n_tokens: int) -> int:
        """Least work of one causal prompt: the linear layers, and half of each score matrix."""
        attention = self.layers * self.query_heads * self.head_dim * 2 * n_tokens * (n_tokens + 1)
        return 2 * n_tokens * self.linear_parameters + attention


def causal(sizes: Sizes) -> Any:
    """A Llama configuration: every layer causal."""
    from transformers import LlamaConfig

    return LlamaConfig(**_shared(sizes))


def window(sizes: Sizes, width: int) -> Any:
    """A Mistral configuration: each query reads the last `width` keys."""
    from transformers import MistralConfig

    return MistralConfig(**_shared(sizes), sliding_window=width)


def chunk(sizes: Sizes, width: int) -> Any:
    """A Llama 4 text configuration without experts: attention inside chunks of `width` tokens."""
    from transformers import Llama4TextConfig

    return Llama4TextConfig(
        **_shared(sizes),
        intermediate_size_mlp=sizes.intermediate,
        attention_chunk_size=width,
        moe_layers=[],
        layer_types=["chunked_attention"] * sizes.layers,
    )


def soft_cap(sizes: Sizes, width: int) -> Any:
    """A Gemma 2 configuration: capped scores, window and causal layers in turn."""
    from transformers import Gemma2Config

    return Gemma2Config(
        **_shared(sizes),
        sliding_window=width,
        query_pre_attn_scalar=sizes.head_dim,
        attn_logit_softcapping=50.0,
    )


def _shared(sizes: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": 1024,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.query_heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": 1 << 17,
        # queries and keys of unit size: scores differ enough for a wrong mask to show
        "initializer_range": sizes.hidden**-0.5,
        "use_cache": False,
    }


def build(config: Any, *, device: str, seed: int) -> PreTrainedModel:
    """The decoder of a configuration, without a head, in float32 with eager attention."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModel.from_config(config, attn_implementation="eager").eval()


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the parameters' dtype, and leave buffers (rotary frequencies) as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def register_by_hand() -> None:
    """Teach transformers the attention `BY_HAND`, which needs no mask tensor."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(BY_HAND, _attention_by_hand)
    AttentionMaskInterface.register(BY_HAND, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _attention_by_hand(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    shared = query.dtype in (torch.float16, torch.bfloat16)  # else unfused: it would build [T, S]
    if not shared:
        group = query.shape[1] // key.shape[1]
        key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=shared
    )
    return out.transpose(1, 2).contiguous(), None
