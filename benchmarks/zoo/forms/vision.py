"""Vision and diffusion attention: windows, 1x1 convolutions, pooling queries, channels first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.forms.parts import BATCH, HEAD_DIM, HEADS, TOKENS, WIDTH, Forms, sequence

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Built

vision = Forms("vision")
SCALE = HEAD_DIM**-0.5
SIDE = 8


def _image(channels: int = WIDTH, side: int = SIDE) -> Tensor:
    return torch.randn(BATCH, channels, side, side)


class _NonLocal(nn.Module):
    """SAGAN: 1x1 convolutions, softmax over keys, values on the left, a learned gate."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Conv2d(WIDTH, 8, 1),
            nn.Conv2d(WIDTH, 8, 1),
            nn.Conv2d(WIDTH, WIDTH, 1),
        )
        self.gamma = nn.Parameter(torch.full((1,), 0.5))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        if self.last:
            energy = torch.bmm(q.permute(0, 2, 1), k)
            out = torch.bmm(v, energy.softmax(-1).permute(0, 2, 1))
        else:
            energy = torch.bmm(k.permute(0, 2, 1), q)
            out = torch.bmm(v, F.softmax(energy, dim=1))
        return self.gamma * out.view(b, c, h, w) + x


@vision.add("train")
def _sagan() -> Built:
    return _NonLocal(True), (_image(),), {}


@vision.add()
def _sagan_softmax_over_rows() -> Built:
    return _NonLocal(False), (_image(),), {}


class _Pooled(nn.Module):
    """Non-local block with keys and values at half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(WIDTH, 16, 1) for _ in range(3))
        self.out = nn.Conv2d(16, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        theta = self.theta(x).view(b, 16, -1).transpose(1, 2)
        phi = F.max_pool2d(self.phi(x), 2).view(b, 16, -1)
        g = F.max_pool2d(self.g(x), 2).view(b, 16, -1).transpose(1, 2)
        y = torch.matmul(torch.matmul(theta, phi).softmax(-1), g)
        return x + self.out(y.transpose(1, 2).reshape(b, 16, h, w))


@vision.add()
def _non_local_pooled() -> Built:
    return _Pooled(), (_image(),), {}


class _Diffusion(nn.Module):
    """Channels-first attention of diffusion U-Nets: both factors scaled by the fourth root."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)
        self.qkv, self.proj = nn.Conv1d(WIDTH, 3 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)
        self.interleaved = interleaved

    def forward(self, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        x = x.reshape(b, c, -1)
        qkv, n = self.qkv(self.norm(x)), x.shape[-1]
        if self.interleaved:
            q, k, v = qkv.reshape(b * HEADS, 3 * HEAD_DIM, n).split(HEAD_DIM, dim=1)
        else:
            q, k, v = (t.reshape(b * HEADS, HEAD_DIM, n) for t in qkv.chunk(3, dim=1))
        root = HEAD_DIM**-0.25
        weights = torch.einsum("bct,bcs->bts", q * root, k * root)
        weights = torch.softmax(weights.float(), dim=-1).type(weights.dtype)
        out = torch.einsum("bts,bcs->bct", weights, v).reshape(b, -1, n)
        return (x + self.proj(out)).reshape(b, c, *size)


@vision.add("train")
def _guided_diffusion() -> Built:
    return _Diffusion(False), (_image(),), {}


@vision.add()
def _guided_diffusion_legacy_order() -> Built:
    return _Diffusion(True), (_image(),), {}


class _Spatial(nn.Module):
    """The single-head attention block of latent autoencoders."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)
        self.q, self.k, self.v, self.out = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x)
        q = self.q(y).reshape(b, c, h * w).permute(0, 2, 1)
        k, v = self.k(y).reshape(b, c, h * w), self.v(y).reshape(b, c, h * w)
        weights = F.softmax(torch.bmm(q, k) * (int(c) ** (-0.5)), dim=2).permute(0, 2, 1)
        return x + self.out(torch.bmm(v, weights).reshape(b, c, h, w))


@vision.add()
def _autoencoder_block() -> Built:
    return _Spatial(), (_image(),), {}


class _CrossLatent(nn.Module):
    """Cross-attention with an optional key mask, heads folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k, self.to_v = nn.Linear(24, WIDTH, bias=False), nn.Linear(24, WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        b = x.shape[0]
        q, k, v = (
            t.unflatten(-1, (HEADS, HEAD_DIM)).permute(0, 2, 1, 3).reshape(b * HEADS, -1, HEAD_DIM)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        scores = torch.einsum("bid,bjd->bij", q, k) * SCALE
        keep = mask.flatten(1).repeat_interleave(HEADS, 0)[:, None, :]
        scores.masked_fill_(~keep, -torch.finfo(scores.dtype).max)
        out = torch.einsum("bij,bjd->bid", scores.softmax(dim=-1), v)
        return self.to_out(out.view(b, HEADS, -1, HEAD_DIM).transpose(1, 2).flatten(2))


@vision.add("train")
def _latent_diffusion_cross() -> Built:
    mask = torch.ones(BATCH, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return _CrossLatent(), (sequence(), torch.randn(BATCH, 7, 24), mask), {}


class _Windows(nn.Module):
    """Swin: shifted windows on the batch axis, a bias table, a mask a window."""

    def __init__(self, shift: int, window: int = 4) -> None:
        super().__init__()
        self.shift, self.window = shift, window
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, HEADS))
        grid = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        )
        gap = grid.flatten(1)[:, :, None] - grid.flatten(1)[:, None, :] + window - 1
        self.register_buffer("index", gap[0] * (2 * window - 1) + gap[1])

    def _split(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, c)

    def _mask(self, side: int) -> Tensor:
        region = torch.zeros(1, side, side, 1)
        cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for place, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
            region[:, rows, columns, :] = place
        region = self._split(region).squeeze(-1)
        gap = region[:, None, :] - region[:, :, None]
        return gap.masked_fill(gap != 0, -100.0).masked_fill(gap == 0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, side, _, c = x.shape
        n = self.window**2
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = self._split(x)
        q, k, v = self.qkv(windows).reshape(-1, n, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        scores = q * SCALE @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        if self.shift:
            mask = self._mask(side)
            count = mask.shape[0]
            scores = scores.view(-1, count, HEADS, n, n) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, HEADS, n, n)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, n, c)
        out = self.proj(out).view(
            b, side // self.window, side // self.window, self.window, self.window, c
        )
        out = out.permute(0, 1, 3, 2, 4, 5).reshape(b, side, side, c)
        return torch.roll(out, (self.shift, self.shift), (1, 2)) if self.shift else out


@vision.add("train")
def _swin_window() -> Built:
    return _Windows(0), (torch.randn(BATCH, SIDE, SIDE, WIDTH),), {}


@vision.add("train")
def _swin_shifted() -> Built:
    return _Windows(2), (torch.randn(BATCH, SIDE, SIDE, WIDTH),), {}


class _Decomposed(nn.Module):
    """SAM and MViT: relative positions of rows and columns, from the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.rows = nn.Parameter(torch.randn(2 * SIDE - 1, HEAD_DIM))
        self.columns = nn.Parameter(torch.randn(2 * SIDE - 1, HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * HEADS, h * w, -1).unbind(0)
        scores = (q * SCALE) @ k.transpose(-2, -1)
        gap = torch.arange(h)[:, None] - torch.arange(h)[None, :] + SIDE - 1
        grid = q.reshape(b * HEADS, h, w, -1)
        rows = torch.einsum("bhwc,hkc->bhwk", grid, self.rows[gap])
        columns = torch.einsum("bhwc,wkc->bhwk", grid, self.columns[gap])
        scores = scores.view(-1, h, w, h, w) + rows[..., None] + columns[..., None, :]
        out = scores.view(-1, h * w, h * w).softmax(-1) @ v
        return out.view(b, HEADS, h, w, -1).permute(0, 2, 3, 1, 4).reshape(b, h, w, -1)


@vision.add("train")
def _decomposed_relative_positions() -> Built:
    return _Decomposed(), (torch.randn(BATCH, SIDE, SIDE, WIDTH),), {}


class _Axial(nn.Module):
    """Attention along rows, then along columns."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def _along(self, x: Tensor, layer: nn.Module) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(2, 3) for t in layer(x).chunk(3, -1))
        return ((q @ k.mT * SCALE).softmax(-1) @ v).transpose(2, 3).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._along(x, self.rows)
        return x + self._along(x.transpose(1, 2), self.columns).transpose(1, 2)


@vision.add("train")
def _axial() -> Built:
    return _Axial(), (torch.randn(BATCH, SIDE, SIDE, WIDTH),), {}


class _OneQuery(nn.Module):
    """Attention pooling with one learned query."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, heads, 1, WIDTH // heads))
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (self.query @ k.mT * SCALE).softmax(-1)
        return (weights @ v).flatten(1)


@vision.add("train")
def _pooling_by_a_learned_query() -> Built:
    return _OneQuery(HEADS), (sequence(),), {}


class _Latents(nn.Module):
    """Perceiver: learned latents read a long input."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, WIDTH))
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents[None].repeat(x.shape[0], 1, 1)
        q = self.q(latents).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for t in self.kv(torch.cat([x, latents], 1)).chunk(2, -1)
        )
        scores = torch.einsum("bhid,bhjd->bhij", q * SCALE, k)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v).transpose(1, 2).flatten(2)


@vision.add("train")
def _perceiver_resampler() -> Built:
    return _Latents(), (sequence(),), {}


class _Reduced(nn.Module):
    """PVT: keys and values from a strided convolution of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.sr, self.norm = nn.Conv2d(WIDTH, WIDTH, 2, 2), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        small = (
            self.sr(x.transpose(1, 2).reshape(b, c, SIDE, SIDE)).reshape(b, c, -1).transpose(1, 2)
        )
        q = self.q(x).reshape(b, n, HEADS, -1).permute(0, 2, 1, 3)
        k, v = self.kv(self.norm(small)).reshape(b, -1, 2, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-2, -1)) * SCALE).softmax(-1).matmul(v).transpose(1, 2).flatten(2)


@vision.add("train")
def _spatial_reduction() -> Built:
    return _Reduced(), (sequence(SIDE * SIDE),), {}


class _Grid(nn.Module):
    """MaxViT: window attention and grid attention in channels-last blocks of six axes."""

    def __init__(self, grid: bool) -> None:
        super().__init__()
        self.qkv, self.grid = nn.Linear(WIDTH, 3 * WIDTH), grid

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        p = 4
        if self.grid:
            x = x.view(b, p, h // p, p, w // p, c).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)
        else:
            x = x.view(b, h // p, p, w // p, p, c).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
        q, k, v = self.qkv(x).view(*x.shape[:4], 3, HEADS, -1).movedim(4, 0).transpose(-3, -2)
        return ((q @ k.mT * SCALE).softmax(-1) @ v).transpose(-3, -2).flatten(-2)


@vision.add()
def _window_six_axes() -> Built:
    return _Grid(False), (torch.randn(BATCH, SIDE, SIDE, WIDTH),), {}


@vision.add()
def _grid_six_axes() -> Built:
    return _Grid(True), (torch.randn(BATCH, SIDE, SIDE, WIDTH),), {}


class _Video(nn.Module):
    """Divided space-time attention: over frames at one place, then over places in one frame."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.space = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def _over(self, x: Tensor, layer: nn.Module) -> Tensor:
        q, k, v = layer(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return x + ((q @ k.mT * SCALE).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, n, c = x.shape
        x = self._over(x.transpose(1, 2).reshape(b * n, t, c), self.time)
        x = x.view(b, n, t, c).transpose(1, 2).reshape(b * t, n, c)
        return self._over(x, self.space).view(b, t, n, c)


@vision.add("train")
def _divided_space_time() -> Built:
    return _Video(), (torch.randn(BATCH, 4, TOKENS, WIDTH),), {}
