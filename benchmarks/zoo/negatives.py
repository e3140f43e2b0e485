"""Models with softmaxes and products that are no attention: nothing here may be touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.forms.parts import BATCH, HEAD_DIM, HEADS, TOKENS, WIDTH, Forms, sequence

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Built

negatives = Forms("negatives")


@negatives.attend("negative")
def _linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@negatives.attend("negative")
def _linear_attention_elu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    norm = 1 / (q @ k.sum(2, keepdim=True).mT)
    return (q @ (k.mT @ v)) * norm


@negatives.attend("negative")
def _performer_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    matrix = torch.linspace(-1, 1, 16 * HEAD_DIM).view(16, HEAD_DIM)
    q, k = (torch.exp(t @ matrix.T - t.square().sum(-1, keepdim=True) / 2) for t in (q, k))
    return (q @ (k.mT @ v)) / (q @ k.sum(2)[..., None])


@negatives.attend("negative")
def _softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * HEAD_DIM**-0.5).softmax(dim=-2)
    return weights @ v


@negatives.attend("negative")
def _slot_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(dim=2) + 1e-8
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@negatives.attend("negative")
def _softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(dim=1) @ v


@negatives.attend("negative")
def _sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT * HEAD_DIM**-0.5) @ v


@negatives.attend("negative")
def _relu_squared_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(q @ k.mT / TOKENS).square() @ v


@negatives.attend("negative")
def _unnormalised_exponential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.exp(q @ k.mT * 0.1) @ v


@negatives.attend("negative")
def _normalised_over_the_wrong_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = torch.exp(q @ k.mT * 0.1)
    return powers / powers.sum(-2, keepdim=True) @ v


@negatives.attend("negative")
def _scores_normalised_by_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / TOKENS) @ v


@negatives.attend("negative")
def _contracted_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights.mT @ v


@negatives.add("negative", "ambiguous")
def _channel_attention() -> Built:
    """XCiT: channels attend to channels; formally an attention with T and D exchanged."""

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 4, 1)
            weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1)
            return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(b, n, c))

    return Channels(), (sequence(),), {}


class _Router(nn.Module):
    """Mixture of experts: a softmax router, the best two, weighted outputs."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.up, self.down = (
            nn.Parameter(torch.randn(4, WIDTH, 16)),
            nn.Parameter(torch.randn(4, 16, WIDTH)),
        )
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        outs = torch.einsum("btd,edf->btef", x, self.up).relu()
        outs = torch.einsum("btef,efd->bted", outs, self.down)
        if self.dense:
            return torch.einsum("bte,bted->btd", weights, outs)
        best, which = weights.topk(2, dim=-1)
        chosen = outs.gather(2, which[..., None].expand(-1, -1, -1, WIDTH))
        return (best[..., None] * chosen).sum(2)


@negatives.add("negative")
def _router_top_two() -> Built:
    return _Router(False), (sequence(),), {}


@negatives.add("negative")
def _router_dense_mixture() -> Built:
    return _Router(True), (sequence(),), {}


@negatives.add("negative")
def _classifier() -> Built:
    return nn.Sequential(nn.Linear(WIDTH, 10), nn.Softmax(dim=-1)), (sequence(),), {}


class _Gated(nn.Module):
    """Pooling by softmax-weighted sums: no queries, no keys."""

    def __init__(self, product: bool) -> None:
        super().__init__()
        self.score, self.product = nn.Linear(WIDTH, 1), product

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(torch.tanh(x)).softmax(dim=1)
        return (weights.mT @ x).squeeze(1) if self.product else (x * weights).sum(1)


@negatives.add("negative")
def _gated_pooling() -> Built:
    return _Gated(False), (sequence(),), {}


@negatives.add("negative")
def _gated_pooling_by_product() -> Built:
    return _Gated(True), (sequence(),), {}


class _Additive(nn.Module):
    """Bahdanau's attention: scores by a small network, not by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, 1)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        scores = self.v(torch.tanh(self.q(query)[:, None] + self.k(keys))).squeeze(-1)
        return torch.bmm(scores.softmax(-1)[:, None], keys).squeeze(1)


@negatives.add("negative")
def _additive_scores() -> Built:
    return _Additive(), (torch.randn(BATCH, WIDTH), sequence()), {}


class _Squeeze(nn.Module):
    """Squeeze-and-excite, and CBAM's channel and spatial gates."""

    def __init__(self, spatial: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(WIDTH, 8, 1), nn.Conv2d(8, WIDTH, 1)
        self.conv = nn.Conv2d(2, 1, 7, padding=3) if spatial else None

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.fc2(self.fc1(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        if self.conv is None:
            return x
        stats = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * self.conv(stats).sigmoid()


@negatives.add("negative")
def _squeeze_and_excite() -> Built:
    return _Squeeze(False), (torch.randn(BATCH, WIDTH, 8, 8),), {}


@negatives.add("negative")
def _cbam() -> Built:
    return _Squeeze(True), (torch.randn(BATCH, WIDTH, 8, 8),), {}


class _SelectiveKernel(nn.Module):
    """SKNet and ResNeSt: a softmax over branches weights their feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, s, padding=s // 2) for s in (3, 5))
        self.score = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.stack([branch(x) for branch in self.branches], dim=1)
        weights = self.score(maps.sum(1).mean((2, 3))).view(-1, 2, WIDTH).softmax(dim=1)
        return (maps * weights[..., None, None]).sum(1)


@negatives.add("negative")
def _selective_kernels() -> Built:
    return _SelectiveKernel(), (torch.randn(BATCH, WIDTH, 8, 8),), {}


class _DynamicConvolution(nn.Module):
    """Softmax-normalised convolution kernels made from the input, applied by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Linear(WIDTH, HEADS * 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        kernels = self.kernel(x).view(b * t * HEADS, 3, 1).softmax(dim=1)
        windows = F.unfold(x.mT[..., None], (3, 1), padding=(1, 0)).mT.reshape(b * t * HEADS, -1, 3)
        return torch.matmul(windows, kernels).view(b, t, c)


@negatives.add("negative")
def _dynamic_convolution() -> Built:
    return _DynamicConvolution(), (sequence(),), {}


class _Contrast(nn.Module):
    """CLIP's head: similarities of two batches, softmax for class probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.words = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(self.image(a), dim=-1), F.normalize(self.words(b), dim=-1)
        return (10.0 * a @ b.T).softmax(-1)


@negatives.add("negative")
def _contrastive_probabilities() -> Built:
    return _Contrast(), (torch.randn(5, WIDTH), torch.randn(7, WIDTH)), {}


class _Expectation(nn.Module):
    """Soft-argmax: the mean position under a softmax heat map."""

    def __init__(self) -> None:
        super().__init__()
        self.heat = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.heat(x).flatten(2).softmax(-1)
        rows, columns = torch.meshgrid(
            torch.linspace(0, 1, 8), torch.linspace(0, 1, 8), indexing="ij"
        )
        return maps @ torch.stack([rows.flatten(), columns.flatten()], dim=-1)


@negatives.add("negative")
def _soft_argmax() -> Built:
    return _Expectation(), (torch.randn(BATCH, 3, 8, 8),), {}


@negatives.add("negative")
def _gru() -> Built:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(WIDTH, 16, batch_first=True), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x)[0]).log_softmax(-1)

    return Recurrent(), (sequence(),), {}


@negatives.add("negative")
def _gram_matrix() -> Built:
    class Gram(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(2)
            return flat @ flat.mT / flat.shape[-1] @ flat

    return Gram(), (torch.randn(BATCH, WIDTH, 8, 8),), {}


class _Routing(nn.Module):
    """Capsules: routing by agreement, a softmax over output capsules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, TOKENS, WIDTH, 6) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.einsum("bnd,jndf->bjnf", x, self.weight)
        logits = torch.zeros(votes.shape[:3])
        for _ in range(2):
            out = (logits.softmax(dim=1)[..., None] * votes).sum(2)
            logits = logits + (votes * out[:, :, None]).sum(-1)
        return out


@negatives.add("negative")
def _capsule_routing() -> Built:
    return _Routing(), (sequence(),), {}


@negatives.add("negative")
def _token_mixing() -> Built:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(TOKENS, TOKENS))

        def forward(self, x: Tensor) -> Tensor:
            return self.mix.softmax(-1) @ x

    return Mixer(), (sequence(),), {}
