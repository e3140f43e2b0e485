"""Two Llama-like layers in plain PyTorch: `sparse-compile inspect examples/tiny_llama.py:build`."""

import torch
from torch import nn

WIDTH, HEADS, KV_HEADS, VOCABULARY = 64, 8, 2, 100
HEAD_DIM = WIDTH // HEADS


class Attention(nn.Module):
    """Causal attention, four query heads to a KV head, written out by hand."""

    def __init__(self) -> None:
        """Make the four projections."""
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.k = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.v = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend from every token to itself and the tokens before it."""
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k(x).view(batch, tokens, KV_HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v(x).view(batch, tokens, KV_HEADS, HEAD_DIM).transpose(1, 2)
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        scores = q @ k.transpose(2, 3) / HEAD_DIM**0.5
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, then a small feed-forward net."""

    def __init__(self) -> None:
        """Make both parts, each with its norm."""
        super().__init__()
        self.attention = nn.Sequential(nn.RMSNorm(WIDTH), Attention())
        self.net = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 128), nn.SiLU())
        self.out = nn.Linear(128, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add both parts to the residual stream."""
        x = x + self.attention(x)
        return x + self.out(self.net(x))


def build() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """The model, and the inputs to inspect it with."""
    layers = (Layer() for _ in range(2))
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *layers, nn.Linear(WIDTH, VOCABULARY))
    return model, (torch.randint(VOCABULARY, (2, 48)),), {}
