"""Greedy decoding with a fixed-size cache, timed token by token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """The tokens a model chose, and how long each step took."""

    tokens: tuple[int, ...]
    step_ms: tuple[float, ...]  # the first is the whole prompt, the others one token each
    gaps: tuple[float, ...]  # logit of the chosen token minus that of the next best

    @property
    def prefill_ms(self) -> float:
        """Time to the first token."""
        return self.step_ms[0]

    @property
    def decode_ms(self) -> float:
        """Median time of one further token."""
        return statistics.median(self.step_ms[1:])

    def __str__(self) -> str:
        return f"{len(self.tokens)} tokens, prefill {self.prefill_ms:.1f} ms"


def static_cache(model: PreTrainedModel, n_slots: int) -> Cache:
    """A cache of fixed size, allocated now: no graph of a compiled model depends on its fill."""
    from transformers import StaticCache

    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = StaticCache(config=config, max_cache_len=n_slots)
    cache.early_initialization(
        1, config.num_key_value_heads, head_dim, dtype=model.dtype, device=model.device
    )
    return cache


@torch.no_grad()
def continue_greedily(
    forward: Callable[..., Any], prompt: torch.Tensor, cache: Cache, n_tokens: int
) -> Continuation:
    """Let a causal language model choose its best token `n_tokens` times.

    Args:
        forward: The model, or a compiled one.
        prompt: Token ids, [1, T].
        cache: Empty; holds the prompt and all but the last token afterwards.
        n_tokens: How many tokens to choose; an end-of-text token does not end it.
    """
    tokens: list[int] = []
    times: list[float] = []
    gaps: list[float] = []
    ids = prompt
    for _ in range(n_tokens):
        start = time.perf_counter()
        logits = forward(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        best, where = logits[:, -1].float().topk(2)
        ids = where[:, :1]
        tokens.append(int(ids))  # waits for the device
        times.append((time.perf_counter() - start) * 1e3)
        gaps.append(float(best[0, 0] - best[0, 1]))
    return Continuation(tokens=tuple(tokens), step_ms=tuple(times), gaps=tuple(gaps))
