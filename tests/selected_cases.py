"""Sizes, inputs and natural errors of selected attention, for its tests on the CPU and the GPU."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.kernels.selected_attention import selected_attention_ref
from sparse_compile.testing import in_dtype, random_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options of one attention."""

    batch: int = 1
    heads: int = 1
    group: int = 2
    queries: int = 37
    keys: int = 37
    dim: int = 16
    value_dim: int = 16
    slots: int = 3
    block: int = 16
    causal: bool = True
    lengths: tuple[int, ...] = ()  # of packed sequences
    layout: str = "contiguous"
    scale: float = 0.25
    std: float = 1.0
    neighbours: int = 1  # tokens in a row that select mostly the same

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        if not self.lengths:
            return None
        bounds = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return bounds.to(device)

    def inputs(self, grad: bool = False) -> list[Tensor]:
        """q, k, v and a selection, in float32 on the CPU."""
        heads = (self.group * self.heads, self.heads, self.heads)
        tokens = (self.queries, self.keys, self.keys)
        dims = (self.dim, self.dim, self.value_dim)
        made = [
            random_heads(self.batch, h, t, d, layout=self.layout).mul_(self.std)
            for h, t, d in zip(heads, tokens, dims, strict=True)
        ]
        return [*(x.requires_grad_(grad) for x in made), self.selection()]

    def selection(self) -> Tensor:
        """Random ascending lists of any length, with KV blocks behind the token among them."""
        longest = max(self.lengths) if self.lengths else self.keys
        n_blocks = -(-longest // self.block)
        shape = (self.batch, self.heads, self.queries)
        wish = torch.rand(*shape, n_blocks)
        if self.neighbours > 1:
            common = torch.rand(*shape[:2], -(-self.queries // self.neighbours), n_blocks)
            common = common.repeat_interleave(self.neighbours, dim=2)[:, :, : self.queries]
            wish = common + wish / n_blocks
        order = wish.argsort(-1)[..., : self.slots]
        order = torch.nn.functional.pad(order, (0, self.slots - order.shape[-1]), value=n_blocks)
        drop = torch.rand(order.shape) < 0.2
        lists = order.masked_fill(drop, n_blocks).sort(-1).values
        return lists.masked_fill(lists == n_blocks, -1).int()

    def arguments(self, device: torch.device) -> tuple[int, float, bool, Tensor | None]:
        """What follows the inputs in calls of the operator."""
        return self.block, self.scale, self.causal, self.cu_seqlens(device)


CASES = {
    "plain": Case(),
    "groups-of-3": Case(group=3, heads=2, batch=2, queries=19, keys=19),
    "groups-of-5": Case(group=5, queries=21, keys=21),
    "one-head": Case(group=1, heads=3),
    "chunked-prefill": Case(queries=19, keys=83),
    "decode": Case(queries=1, keys=130, slots=5),
    "more-queries-than-keys": Case(queries=50, keys=23),
    "not-causal": Case(causal=False, keys=41),
    "dims-80-48": Case(dim=80, value_dim=48),
    "dims-192-128": Case(dim=192, value_dim=128, queries=18, keys=18),
    "block-32": Case(block=32, keys=70, queries=70),
    "block-128": Case(block=128, queries=40, keys=290, slots=3),
    "packed": Case(lengths=(5, 16, 1, 15), slots=2),
    "packed-ragged": Case(lengths=(33, 4), heads=2, group=3),
    "token-major": Case(layout="token_major", heads=2),
    "padded-views": Case(layout="padded", heads=2),
    "one-slot": Case(slots=1),
    "more-slots-than-blocks": Case(slots=7),
    "large-logits": Case(scale=1.0, std=3.0),
    "neighbours-agree": Case(queries=50, keys=120, slots=4, group=3, neighbours=16),
    "packed-neighbours": Case(lengths=(20, 40, 4), queries=64, keys=64, slots=2, neighbours=32),
}


def reference(case: Case, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return selected_attention_ref(*inputs, *case.arguments(inputs[0].device))


def natural_outputs(case: Case, inputs: list[Tensor], truth: Tensor) -> list[Tensor]:
    """The output as the reference rounds it, and off by a rounding of the weights and of the scores.

    Of a few elements the first is at times zero. Scores are rounded to float32.
    """
    rough = reference(case, inputs)[0]
    q, k = (x.detach().double() for x in inputs[:2])
    scores = q @ k.repeat_interleave(case.group, dim=1).mT * case.scale
    steps = torch.finfo(rough.dtype).eps, float(scores.abs().max()) * torch.finfo(torch.float32).eps
    return [rough, truth + inputs[2].detach().double().abs().max() * sum(steps) / 2]


def worst_outputs(case: Case, inputs: list[Tensor]) -> tuple[float, float]:
    """How far an output and a log-sum-exp in float32 may be off, whatever the order of its sums.

    For tests that try many inputs: the natural error of a few elements is at times far below this.
    """
    q, k, v = (x.detach().double() for x in inputs[:3])
    k = k.repeat_interleave(case.group, dim=1)
    largest = float((q.abs() @ k.abs().mT).max()) * abs(case.scale)
    half_step = torch.finfo(torch.float32).eps / 2
    # each score: a product of D terms, and four factors or differences
    of_score = (case.dim + 4) * half_step * largest
    # numerator and denominator: a sum of as many terms as a row has keys, and exponentials of
    # scores that are off; each off by 2 steps itself, the merge of partial results by 4 more
    relative = of_score + (case.slots * case.block + 8) * half_step
    out = 2 * relative * float(v.abs().max())
    return out, relative + 4 * half_step * (largest + math.log(case.slots * case.block))


def gradients(
    out: Tensor, lse: Tensor, inputs: list[Tensor], weights: list[Tensor]
) -> list[Tensor]:
    """Gradients of q, k and v where those of the output and the log-sum-exp are `weights`."""
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    total = (out.to(lse.dtype) * weights[0]).sum() + (lse * weights[1]).sum()
    return list(torch.autograd.grad(total, inputs[:3]))


def recomputed(case: Case, inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Natural gradients of a backward that has no [T, S] matrix; see `from_lse`."""
    q, k, v, selection = inputs
    one_hot = torch.eye(case.keys, device=q.device).expand(*v.shape[:2], -1, -1)
    flat, arguments = torch.zeros_like(q, dtype=torch.float32), case.arguments(q.device)
    reads = selected_attention_ref(flat, k.float(), one_hot, selection, *arguments)[0] != 0
    outputs = []
    truths = reference(case, in_dtype(inputs, torch.float64))
    for natural, truth in zip(reference(case, inputs), truths, strict=True):
        twice = (natural + (natural.double() - truth)).to(natural.dtype)  # as a forward may err
        outputs.append(torch.where(natural.isfinite(), twice, natural))
    return from_lse([q, k, v], reads, case.scale, outputs, weights)


def from_lse(
    inputs: list[Tensor], reads: Tensor, scale: float, outputs: Sequence[Tensor],
    weights: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Gradients from the output and the log-sum-exp, each off by one step, in powers of two.

    These two are all that a backward without a [T, S] matrix has, so their rounding is natural, as
    is that of the weights and their gradients where matrix units multiply them. `reads` tells which
    keys a row reads, [B, Hq, T, S].
    """
    q, k, v = inputs
    group = q.shape[1] // k.shape[1]
    out, lse = (x * (1 + torch.finfo(x.dtype).eps * torch.randn_like(x).sign()) for x in outputs)
    wide_q, wide_k, wide_v = (x.float() for x in (q, k, v))
    many_k, many_v = (x.repeat_interleave(group, dim=1) for x in (wide_k, wide_v))
    scores = (wide_q @ many_k.mT * scale - lse[..., None]) * 1.4426950408889634
    shares = torch.where(reads, torch.exp2(scores), 0.0)
    delta = (weights[0] * out).sum(-1) - weights[1].masked_fill(lse == -torch.inf, 0.0)
    inner = shares * (weights[0] @ many_v.mT - delta[..., None]) * scale
    shares, inner = (x.to(q.dtype).float() for x in (shares, inner))
    of_heads = [inner.mT @ wide_q, shares.mT @ weights[0]]
    found = [inner @ many_k, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in of_heads)]
    return [x.to(q.dtype) for x in found]


def natural_lse(rough: Tensor, truth: Tensor, dim: int) -> list[Tensor]:
    """Log-sum-exps as the reference rounds them, and off by what adding `dim` products may lose.

    A unit that adds them one by one loses half a step at each, which grows as a random walk.
    """
    step = torch.finfo(torch.float32).eps / 2
    largest = truth.masked_fill(truth == -torch.inf, 0.0).abs().max()
    return [rough, truth + step * dim**0.5 * largest]
