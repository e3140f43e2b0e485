"""A small attention that the backend tests compile, and how they do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sparse_compile
from sparse_compile import backend

B, H, T, D = 2, 2, 6, 4


class Attention(nn.Module):
    """Causal attention with projections, as a model would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)
        self.out = nn.Linear(H * D, H * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.mT * D**-0.5).masked_fill(~keep, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Buffered(Attention):
    """The same with its mask in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(T, T, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = (q @ k.mT).masked_fill(~self.keep[: x.shape[1], : x.shape[1]], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def tokens(count: int = T, **options: Any) -> Tensor:
    return torch.randn(B, count, H * D, **options)


def compiled(model: Any, *, full: bool = False, **options: Any) -> Callable[..., Any]:
    chosen = backend.sparse_compile if full else backend.rewrite_only
    return torch.compile(model, backend=chosen, **options)


def the_site() -> Any:
    (site,) = sparse_compile.last_report().sites
    return site
