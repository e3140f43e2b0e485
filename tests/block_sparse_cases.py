"""Programs, sizes, lists and natural errors of block-sparse attention, for the CPU and the GPU."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy import Abs, And, Eq, Min, Ne, Or, floor
from torch import Tensor

from sparse_compile.expressions import Load, Where, b, h, s, t, x
from sparse_compile.ir import ScoreProgram
from sparse_compile.kernels.block_sparse import block_sparse_attention_ref
from sparse_compile.testing import random_heads

CAUSAL = s <= t
EMPTY = And(s <= t - 3, t - s < 20)  # the first rows keep nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and a program."""

    batch: int = 1
    heads: int = 1  # of keys
    group: int = 2
    queries: int = 53
    keys: int = 53
    dim: int = 16
    value_dim: int = 16
    tile: int = 16
    block: int = 16
    layout: str = "contiguous"
    std: float = 1.0
    scale: float = 0.25
    formulas: dict[str, Any] = dataclasses.field(default_factory=dict)
    makers: tuple[Callable[["Case"], Tensor], ...] = ()
    lists: str = "bounds"  # or "random", with full blocks by chance, some empty
    list_heads: str = "shared"  # of random lists: "shared", "kv" or "query"

    @property
    def program(self) -> ScoreProgram:
        return ScoreProgram(scale=self.scale, **self.formulas)

    def inputs(self, grad: bool = False) -> list[Tensor]:
        """q, k, v and operands, in float32 on the CPU."""
        shapes = (
            (self.group * self.heads, self.queries, self.dim),
            (self.heads, self.keys, self.dim),
            (self.heads, self.keys, self.value_dim),
        )
        made = [random_heads(self.batch, *one, layout=self.layout) * self.std for one in shapes]
        made += [make(self) for make in self.makers]
        return [one.requires_grad_(grad and one.is_floating_point()) for one in made]

    def listed(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Indices, counts and counts of full blocks."""
        q, k, _, *operands = inputs
        if self.lists == "bounds":
            text = self.program.encode()
            found = torch.ops.sparse_compile.list_blocks_v1(
                q.detach(), k.detach(), [one.detach() for one in operands], text, self.tile,
                self.block, None,
            )  # fmt: skip
            return list(found)
        n_blocks, n_tiles = -(-self.keys // self.block), -(-self.queries // self.tile)
        heads = {"shared": 1, "kv": self.heads, "query": self.heads * self.group}[self.list_heads]
        shape = (1 if heads == 1 else self.batch, heads, n_tiles)
        indices = torch.rand(*shape, n_blocks).argsort(-1).int()
        counts = torch.randint(0, n_blocks + 1, shape, dtype=torch.int32)
        full = torch.minimum(torch.randint(0, n_blocks + 1, shape, dtype=torch.int32), counts)
        return [one.to(q.device) for one in (indices, counts, full)]


def slopes(case: Case) -> Tensor:
    return torch.rand(case.heads * case.group)


def documents(case: Case) -> Tensor:
    length = max(case.queries, case.keys)
    return torch.arange(length).expand(case.batch, -1) // (
        7 + 6 * torch.arange(case.batch)[:, None]
    )


def short_documents(case: Case) -> Tensor:
    return documents(case).int()


def padding(case: Case) -> Tensor:
    return torch.arange(case.keys) >= 5 * torch.arange(1, case.batch + 1)[:, None]


def bias(case: Case) -> Tensor:
    wide = torch.randn(case.batch, 1, case.queries, case.keys + 3)
    return wide[..., 1:-2]


def table(case: Case) -> Tensor:
    return torch.randn(10, case.heads * case.group)


def scalar(case: Case) -> Tensor:
    return torch.randn(())


def offset(case: Case) -> Tensor:
    return torch.tensor(case.keys - case.queries)


SAME_DOCUMENT = Eq(Load(0, b, t), Load(0, b, s))
# name: (formulas, makers of the operands)
PROGRAMS: dict[str, tuple[dict[str, Any], tuple[Callable[[Case], Tensor], ...]]] = {
    "dense": ({}, ()),
    "causal": ({"keep": CAUSAL}, ()),
    "window": ({"keep": And(CAUSAL, t - s < 20)}, ()),
    "symmetric-window": ({"keep": Abs(t - s) <= 11}, ()),
    "chunk": ({"keep": And(CAUSAL, Eq(floor(t / 24), floor(s / 24)))}, ()),
    "shifted-chunk": ({"keep": And(CAUSAL, Eq(floor((t - 5) / 24), floor((s - 5) / 24)))}, ()),
    "prefix": ({"keep": Or(CAUSAL, s < 18)}, ()),
    "document": ({"keep": And(CAUSAL, SAME_DOCUMENT)}, (documents,)),
    "int32-document": ({"keep": And(CAUSAL, SAME_DOCUMENT)}, (short_documents,)),
    "padding": ({"keep": And(CAUSAL, Ne(Load(0, b, s), 0))}, (padding,)),
    "per-head": ({"keep": And(CAUSAL, t - s < 10 * h + 1)}, ()),
    "read-offset": ({"keep": s <= t + Load(0)}, (offset,)),
    "strided": ({"keep": And(CAUSAL, Eq(sympy.Mod(t - s, 3), 0))}, ()),
    "soft-cap": ({"keep": CAUSAL, "score": 3 * sympy.tanh(x / 3)}, ()),
    "alibi": ({"keep": CAUSAL, "score": x + Load(0, h) * (s - t)}, (slopes,)),
    "soft-cap-then-alibi": (
        {"keep": CAUSAL, "score": 3 * sympy.tanh(x / 3) + Load(0, h) * (s - t)}, (slopes,)
    ),
    "sink": ({"keep": And(CAUSAL, t - s < 9), "sink": Load(0, h)}, (slopes,)),
    "sink-by-row": ({"keep": EMPTY, "sink": Load(0, h) * t}, (slopes,)),
    "bias": ({"score": x + Load(0, b, 0, t, s)}, (bias,)),
    "relative-bias": ({"score": x + Load(0, Min(Abs(t - s), 9), h)}, (table,)),
    "two-reads": ({"score": x * Load(0, 3, h) + Load(0, Min(s, 9), 1)}, (table,)),
    "from-the-end": ({"score": x + Load(0, -1, h) + Load(0, Min(s, 9) - 10, 0)}, (table,)),
    "learned-scale": ({"score": x * sympy.exp(Load(0)), "keep": CAUSAL}, (scalar,)),
    "no-scores": ({"score": Load(0, b, 0, t, s), "keep": CAUSAL}, (bias,)),
    "branch": ({"score": Where(s < 3, x, x * Abs(x) / 4 + Load(0, h))}, (slopes,)),
    "negative-scale": ({"score": -x, "keep": CAUSAL}, ()),
    "empty-zero": ({"keep": EMPTY}, ()),
    "empty-uniform": ({"keep": EMPTY, "empty_rows": "uniform"}, ()),
    "empty-nan": ({"keep": EMPTY, "empty_rows": "nan"}, ()),
}  # fmt: skip

_DOCUMENT = {"formulas": PROGRAMS["document"][0], "makers": PROGRAMS["document"][1]}
_CAUSAL = {"formulas": {"keep": CAUSAL}}
# "several" has more than one of everything, and no size that divides another
CASES: dict[str, Case] = {
    "several": Case(batch=2, heads=2, group=3, queries=19, keys=35, **_DOCUMENT),
    "one-head": Case(group=1, heads=2, **_CAUSAL),
    "groups-of-5": Case(group=5, queries=21, keys=21, **_CAUSAL),
    "decode": Case(queries=1, keys=130, formulas={"keep": t + 129 - s < 40}),
    "more-queries-than-keys": Case(queries=50, keys=23, formulas={"keep": s <= t - 27}),
    "even": Case(queries=64, keys=64, **_CAUSAL),
    "dims-80-48": Case(dim=80, value_dim=48, queries=20, keys=20, **_CAUSAL),
    "dims-24-16": Case(dim=24, value_dim=16, **_CAUSAL),
    "wide-tiles": Case(tile=64, block=32, queries=150, keys=150, **_CAUSAL),
    "wide-blocks": Case(tile=32, block=128, queries=40, keys=290, formulas={"keep": s <= t + 250}),
    "token-major": Case(layout="token_major", heads=2, **_DOCUMENT),
    "padded-views": Case(layout="padded", heads=2, **_CAUSAL),
    "large-logits": Case(std=5.0, scale=1.0, **_CAUSAL),
    "random-lists": Case(lists="random", heads=2, queries=70, keys=90, **_CAUSAL),
    "random-lists-of-kv-heads": Case(
        lists="random", list_heads="kv", heads=2, batch=2, queries=40, keys=50, **_CAUSAL
    ),
    "random-lists-of-query-heads": Case(
        lists="random", list_heads="query", heads=2, queries=70, keys=90, **_CAUSAL
    ),
    "random-lists-without-a-mask": Case(lists="random", queries=70, keys=90),
}


def case_of(name: str) -> Case:
    """A case by its name, or one with the program of that name."""
    if name in CASES:
        return CASES[name]
    formulas, makers = PROGRAMS[name]
    return Case(formulas=formulas, makers=makers)


def reference(
    case: Case, inputs: Sequence[Tensor], lists: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    q, k, v, *operands = inputs
    return block_sparse_attention_ref(
        q, k, v, *lists, operands, case.program, case.tile, case.block
    )  # fmt: skip


def results(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Output, log-sum-exp and gradients of all inputs that have some."""
    out, lse = outputs
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    total = (out.to(lse.dtype) * weights[0]).sum() + (finite * weights[1]).sum()
    leaves = [one for one in inputs if one.requires_grad]
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [out.detach(), lse.detach(), *grads]


def naturals(
    case: Case, inputs: Sequence[Tensor], lists: Sequence[Tensor], weights: Sequence[Tensor],
    logit_step: float = 0.0,
) -> list[list[Tensor]]:  # fmt: skip
    """What the reference gives in float64 for inputs that are off by two steps of their dtype.

    One is the numbers' own, one for what is computed from them and rounded: scores, log-sum-exps,
    weights and their gradients.

    Args:
        case: What is computed.
        inputs: In the working dtype.
        lists: Of KV blocks.
        weights: Of the output and the log-sum-exp, in float64.
        logit_step: A relative error of the scores, besides.
    """
    found = []
    for _ in range(3):
        moved = []
        for number, one in enumerate(inputs):
            wide = one.detach()
            if one.is_floating_point():
                step = 2 * torch.finfo(one.dtype).eps
                if number == 0:  # of the scores; a sum of products drifts by a step at each
                    step += logit_step + torch.finfo(torch.float32).eps * wide.shape[-1] ** 0.5
                wide = one.detach().double() * (1 + step * torch.randn_like(one.double()).sign())
            moved.append(wide.requires_grad_(one.requires_grad))
        by = [one * (1 + torch.finfo(inputs[0].dtype).eps * torch.randn_like(one).sign())
              for one in weights]  # fmt: skip
        found.append(results(reference(case, moved, lists), moved, by))
    return found
