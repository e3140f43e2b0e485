"""Tiny random models with caches, for tests of `PagedKVCache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from sparse_compile.integrations.paged_kv_cache import PagedKVCache

VOCABULARY, PAD = 97, 0
PROMPT, NEW, LONGEST = 19, 20, 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def model_of(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """A model with large random weights, so that tokens vary."""
    torch.manual_seed(0)
    if name == "gemma3":
        more = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        config = Gemma3TextConfig(
            **SIZES | more, num_key_value_heads=1, query_pre_attn_scalar=8, use_cache=True
        )
        model = Gemma3ForCausalLM(config)
    else:
        kv_heads = {"llama": 4, "llama-gqa": 2}[name]
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=kv_heads))
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(6)
    model.set_attn_implementation(attention)
    return model.eval()


def prompts(padding: int = 0) -> dict[str, Tensor]:
    """Two prompts; the first begins with so many tokens of padding."""
    ids = torch.randint(2, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def cache_for(model: PreTrainedModel, **options: Any) -> PagedKVCache:
    """An empty cache."""
    return PagedKVCache(model.config, **{"max_length": LONGEST} | options)


def generated(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Tokens of prompts and continuation; `past_key_values` is the stock cache if left out."""
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, **options)
