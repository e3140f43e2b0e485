"""What the hand-written forms share: projections around a function of Q, K and V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import Built, Catalogue

WIDTH = 32
HEADS = 4
HEAD_DIM = WIDTH // HEADS
TOKENS = 12
BATCH = 2

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Projected(nn.Module):
    """Linear projections to heads, a function of Q, K and V [B, H, T, D], and a projection back."""

    def __init__(self, attend: Attend, kv_heads: int = HEADS) -> None:
        """Make the projections."""
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.v = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention of a sequence [B, T, WIDTH]."""
        q, k, v = (split_heads(p(x)) for p in (self.q, self.k, self.v))
        mixed = self.attend(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], WIDTH))


def split_heads(x: Tensor) -> Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return x.view(x.shape[0], x.shape[1], -1, HEAD_DIM).transpose(1, 2)


def sequence(tokens: int = TOKENS, width: int = WIDTH) -> Tensor:
    """A random sequence [B, T, width]."""
    return torch.randn(BATCH, tokens, width)


class Forms(Catalogue):
    """A catalogue that also takes bare functions of Q, K and V."""

    def attend(self, *tags: str, kv_heads: int = HEADS) -> Callable[[Attend], Attend]:
        """Register a function of Q [B, H, T, D], K and V, with projections around it."""

        def register(attend: Attend) -> Attend:
            def make() -> Built:
                return Projected(attend, kv_heads), (sequence(),), {}

            make.__name__ = attend.__name__
            self.add(*tags)(make)
            return attend

        return register


def causal(tokens: int = TOKENS, **options: Any) -> Tensor:
    """A Boolean lower triangle."""
    return torch.ones(tokens, tokens, dtype=torch.bool, **options).tril()
