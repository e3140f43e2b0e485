"""An encoder with soft-capped local attention: `sparse-compile inspect examples/window_encoder.py:build`."""

import torch
from torch import nn

WIDTH, HEADS, TOKENS, WINDOW, CAP = 64, 4, 96, 8, 30.0


class LocalAttention(nn.Module):
    """Every token reads its neighbours on both sides, but no padding."""

    def __init__(self) -> None:
        """Make the fused projection of Q, K and V."""
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """Attend within the window."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, HEADS, -1).unbind(2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * (WIDTH // HEADS) ** -0.5
        scores = CAP * torch.tanh(scores / CAP)
        place = torch.arange(tokens, device=x.device)
        near = (place[:, None] - place[None, :]).abs() <= WINDOW
        keep = near & is_token[:, None, None, :]
        weights = torch.where(keep, scores, torch.finfo(x.dtype).min).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)


class Encoder(nn.Module):
    """Three layers of local attention over embedded tokens."""

    def __init__(self) -> None:
        """Make the embedding and the layers."""
        super().__init__()
        self.embed = nn.Embedding(100, WIDTH)
        self.layers = nn.ModuleList(LocalAttention() for _ in range(3))

    def forward(self, tokens: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """Run the layers, each added to what it read."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x, is_token)
        return x


def build() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """The model, and the inputs to inspect it with: the second text is shorter."""
    is_token = torch.arange(TOKENS) < torch.tensor([TOKENS, TOKENS - 20])[:, None]
    return Encoder(), (torch.randint(100, (2, TOKENS)),), {"is_token": is_token}
