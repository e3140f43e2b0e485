"""Attention of a sample of rows in plain PyTorch, against which benchmarks check long sequences.

All functions take self-attention inputs by name: `q` [B, Hq, T, D], `k` and `v` [B, Hkv, T, D], and
give [B, Hq, R, D] for the tokens `rows`; autograd gives the gradients of a loss on those rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Reference = Callable[[Inputs, torch.dtype | None], Tensor]  # inputs, rounding -> rows


def sample(tokens: int, n_rows: int, device: str) -> Tensor:
    """Ascending positions of about `n_rows` tokens: the ends, a run of neighbours, random ones."""
    run = tokens // 2 + torch.arange(n_rows // 3)
    anywhere = torch.randint(tokens, (n_rows - len(run),))
    ends = torch.tensor([0, 1, tokens - 1])
    return torch.cat([run, anywhere, ends]).clamp(max=tokens - 1).unique().to(device)


def dense(inputs: Inputs, rounding: torch.dtype | None, rows: Tensor) -> Tensor:
    """Every token reads all keys up to its own."""
    key = torch.arange(inputs["k"].shape[2], device=rows.device)
    return _shared(inputs["q"], inputs["k"], inputs["v"], rows, key <= rows[:, None], rounding)


def compressed(
    inputs: Inputs, rounding: torch.dtype | None, rows: Tensor, block: int, stride: int
) -> Tensor:
    """Every token reads the compressed keys that end at its own position or before."""
    k, v = inputs["k_cmp"], inputs["v_cmp"]
    keep = visible(k.shape[2], rows, block, stride)
    return _shared(inputs["q"], k, v, rows, keep, rounding)


def visible(n_compressed: int, rows: Tensor, block: int, stride: int) -> Tensor:
    """Which compressed keys a token may read, [R, C]."""
    last = torch.arange(n_compressed, device=rows.device) * stride + block - 1
    return last <= rows[:, None]


def window(inputs: Inputs, rounding: torch.dtype | None, rows: Tensor, width: int) -> Tensor:
    """Every token reads the `width` keys up to its own."""
    index = rows[:, None] - torch.arange(width, device=rows.device)
    heads = inputs["k"].shape[:2]
    return _gathered(inputs, index.expand(*heads, -1, -1), rows, rounding)


def selected(
    inputs: Inputs, rounding: torch.dtype | None, rows: Tensor, block_indices: Tensor,
    block_size: int,
) -> Tensor:  # fmt: skip
    """Every token reads its own list of KV blocks; `block_indices` is [B, Hkv, T, K]."""
    blocks = block_indices[:, :, rows].long()[..., None]
    index = blocks * block_size + torch.arange(block_size, device=rows.device)
    return _gathered(inputs, index.masked_fill(blocks < 0, -1).flatten(-2), rows, rounding)


def _gathered(inputs: Inputs, index: Tensor, rows: Tensor, rounding: torch.dtype | None) -> Tensor:
    """Each row and KV head reads the keys `index`, [B, Hkv, R, N], but none behind the row."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    keep = (index >= 0) & (index <= rows[:, None])
    batch, head = (torch.arange(n, device=rows.device) for n in k.shape[:2])
    at = (batch[:, None, None, None], head[None, :, None, None], index.clamp(0, k.shape[2] - 1))
    grouped = q[:, :, rows].unflatten(1, (k.shape[1], -1)).transpose(2, 3)  # [B, Hkv, R, G, D]
    out = _attend(grouped, k[at], v[at], keep[..., None, :], rounding)
    return out.transpose(2, 3).flatten(1, 2)


def _shared(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keep: Tensor, rounding: torch.dtype | None
) -> Tensor:
    """All rows read the same keys where `keep`, [R, N], allows it."""
    grouped = q[:, :, rows].unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hkv, G * R, D]
    keep = keep.repeat(q.shape[1] // k.shape[1], 1)
    out = _attend(grouped, k, v, keep, rounding)
    return out.unflatten(2, (-1, len(rows))).flatten(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, rounding: torch.dtype | None) -> Tensor:
    if rounding is not None:
        return _Rounded.apply(q, k, v, keep, rounding)
    # a row with nothing to read gives 0, and no NaN gradient
    empty = ~keep.any(-1, keepdim=True)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~keep & ~empty, float("-inf")).softmax(-1)
    return weights.masked_fill(empty, 0.0) @ v


class _Rounded(torch.autograd.Function):
    """The natural error: rounds what matrix units multiply and what a forward hands on.

    A backward without a [T, S] matrix has but the rounded output and the log-sum-exp, which is off
    by one step here, to compute the weights from.
    """

    @staticmethod
    def forward(ctx, q, k, v, keep, rounding):
        def rounded(x: Tensor) -> Tensor:
            return x.to(rounding).to(x.dtype)

        scores = ((q @ k.mT) * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
        out = rounded(rounded(scores.softmax(-1).nan_to_num(0.0)) @ v)
        ctx.rounded = rounded
        ctx.save_for_backward(q, k, v, scores, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, scores, out = ctx.saved_tensors
        lse = scores.logsumexp(-1, keepdim=True)
        lse = lse * (1 + torch.finfo(lse.dtype).eps * torch.randn_like(lse).sign())
        weights = torch.exp(scores - lse).nan_to_num(0.0)
        delta = (grad * out).sum(-1, keepdim=True)
        inner = ctx.rounded(weights * (grad @ v.mT - delta) * q.shape[-1] ** -0.5)
        return inner @ k, inner.mT @ q, ctx.rounded(weights).mT @ grad, None, None


def block_scores(
    inputs: Inputs, rows: Tensor, *, block: int, stride: int, block_size: int, sinks: int,
    local: int,
) -> Tensor:  # fmt: skip
    """How much a token wants each KV block, [B, Hkv, R, n_blocks]; -1 for those behind it.

    The weights of compressed attention, added over the group, count for a KV block as often as the
    two share a run of `stride` tokens. A forced KV block gets more than any other can.
    """
    q, k = inputs["q"].float(), inputs["k_cmp"].float()
    n_tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    scores = q[:, :, rows] @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    keep = visible(k.shape[2], rows, block, stride)
    weights = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)
    weights = weights.unflatten(1, (k.shape[1], group)).sum(2)
    n_blocks, ratio = -(-n_tokens // block_size), block_size // stride
    run = torch.arange(k.shape[2], device=q.device)[:, None]
    first = torch.arange(n_blocks, device=q.device) * ratio
    shares = (run + block // stride).minimum(first + ratio) - run.maximum(first)
    found = weights @ shares.clamp(min=0).float()
    number, own = torch.arange(n_blocks, device=q.device), rows[:, None] // block_size
    forced = (number < sinks) | ((number > own - local) & (number <= own))
    most = 1.0 + group * (block // stride)
    return found.masked_fill(forced, most).masked_fill(number > own, -1.0)


def choice_quality(scores: Tensor, block_indices: Tensor) -> float:
    """The least share, over rows, of the best possible sum of scores that a choice reaches.

    Args:
        scores: `block_scores`.
        block_indices: The choice for the same rows, [B, Hkv, R, K].
    """
    wanted = scores.topk(min(block_indices.shape[-1], scores.shape[-1]), -1).values.clamp(min=0.0)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    live = block_indices >= 0
    # padding goes to a KV block of its own, which is cut off
    at = block_indices.long().masked_fill(~live, scores.shape[-1])
    chosen = torch.nn.functional.pad(chosen, (0, 1)).scatter(-1, at, True)[..., :-1]
    if (chosen & (scores < 0)).any():
        return 0.0  # a KV block behind its row
    reached = scores.where(chosen, 0.0).sum(-1)
    return float((reached / wanted.sum(-1)).min())


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a sample of rows must give."""

    out: Tensor  # of the rows, float64
    grads: Mapping[str, Tensor]  # of all inputs, for a loss on the rows, float64
    natural: Mapping[str, float]  # relative errors that rounding makes, `out` and by input

    def error(self, name: str, actual: Tensor) -> float:
        """The relative error of a tensor: `out` or the gradient of an input."""
        return relative_error(actual, self.out if name == "out" else self.grads[name])


def truth_of(reference: Reference, inputs: Inputs, grad_rows: Tensor) -> Truth:
    """Run a reference in float64, and in float32 as the working dtype rounds it.

    Args:
        reference: Gives the rows.
        inputs: In the working dtype.
        grad_rows: The gradient of the rows, in the working dtype.
    """
    dtype = grad_rows.dtype
    exact = _run(reference, inputs, grad_rows, torch.float64, None)
    rough = _run(reference, inputs, grad_rows, torch.float32, dtype)
    natural = {
        name: relative_error(rough[name].to(dtype), tensor) for name, tensor in exact.items()
    }
    return Truth(out=exact.pop("out"), grads=exact, natural=natural)


def _run(
    reference: Reference, inputs: Inputs, grad_rows: Tensor, dtype: torch.dtype,
    rounding: torch.dtype | None,
) -> dict[str, Tensor]:  # fmt: skip
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    out = reference(leaves, rounding)
    used = torch.autograd.grad(out, list(leaves.values()), grad_rows.to(dtype), allow_unused=True)
    grads = {name: g for name, g in zip(leaves, used, strict=True) if g is not None}
    return {"out": out.detach(), **grads}


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference, over that of the truth."""
    difference = (actual.to(truth.dtype) - truth).square().mean().sqrt()
    return float(difference / truth.square().mean().sqrt())
