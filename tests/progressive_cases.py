"""Problems of `progressive_attention` that its tests on CPUs and GPUs share."""

import dataclasses
import math
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor

from sparse_compile.expressions import Load, b, h, s, t, x
from sparse_compile.ir import ScoreProgram
from sparse_compile.kernels import progressive_attention
from sparse_compile.kernels.paged_cache import sketch_ref
from sparse_compile.testing import TANH_STEP, assert_close_derived, in_dtype
from tests.selected_cases import natural_lse

KINDS = ("random", "peaked", "outlier")


class Inputs(NamedTuple):
    """What the operator takes before its operands."""

    q: Tensor
    pool: Tensor
    codes: Tensor
    scales: Tensor
    table: Tensor
    lengths: Tensor

    def to(self, device: str) -> "Inputs":
        return Inputs(*(tensor.to(device) for tensor in self))


class Found(NamedTuple):
    """What it gives."""

    out: Tensor
    lse: Tensor
    mass: Tensor
    n_pages: Tensor
    pages: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options of one attention."""

    lengths: tuple[int, ...] = (210, 40)
    heads: int = 1
    group: int = 3
    dim: int = 16
    page: int = 16
    entries: int = 14  # of the table
    kind: str = "peaked"
    std: float = 1.0  # of what queries are multiplied by
    p: float = 0.9
    window: int = 0
    sinks: int = 1
    local: int = 2
    min_pages: int = 0
    max_pages: int = 0
    formulas: tuple[tuple[str, Any], ...] = ()
    operands: tuple[tuple[int, ...], ...] = ()  # shapes

    @property
    def program(self) -> ScoreProgram:
        return ScoreProgram(scale=self.dim**-0.5, **dict(self.formulas))

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """Queries, pages in any order with NaN in what belongs to none, and the sketch."""
        counts = [-(-n // self.page) for n in self.lengths]
        n_pages = sum(counts) + 2
        q, keys = self._heads(max([*self.lengths, 1]))
        pool = torch.full((n_pages, self.heads, 2, self.page, self.dim), math.nan)
        table = torch.full((len(self.lengths), self.entries), -1, dtype=torch.int32)
        pages = iter(torch.randperm(n_pages).tolist())
        for row, n in enumerate(self.lengths):
            for entry in range(counts[row]):
                page, at = next(pages), entry * self.page
                table[row, entry] = page
                some = keys[row, :, at : min(n, at + self.page)]
                pool[page, :, 0, : some.shape[1]] = some
                pool[page, :, 1, : some.shape[1]] = torch.randn_like(some)
        pool = pool.to(dtype)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return Inputs(q.to(dtype), pool, *sketch_ref(pool[:, :, 0]), table, lengths)

    def _heads(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Queries [B, Hq, 1, D] and keys [B, Hkv, S, D]."""
        batch, width = len(self.lengths), self.group * self.heads
        q = torch.randn(batch, width, 1, self.dim)
        keys = torch.randn(batch, self.heads, tokens, self.dim)
        if self.kind == "peaked":  # runs of keys near a centre, queries near a few of these
            centres = torch.randn(batch, self.heads, 8, self.dim) * 1.5
            runs = torch.randint(0, 8, (batch, self.heads, -(-tokens // 24)))
            runs = runs.repeat_interleave(24, 2)[:, :, :tokens, None].expand_as(keys)
            keys = 0.5 * keys + centres.gather(2, runs)
            near = torch.randint(0, 8, (batch, width, 1, 1)).expand_as(q)
            q = 0.5 * q + centres.repeat_interleave(self.group, 1).gather(2, near)
        if self.kind == "outlier":  # a channel far from zero, as models have, takes the codes
            keys[..., 3] += 12.0
        return q * self.std, keys

    def options(self) -> tuple[Any, ...]:
        """What the operator takes after its program."""
        return (
            self.p, None, self.window, self.sinks, self.local, self.min_pages, self.max_pages,
        )  # fmt: skip

    def run(self, way: str, inputs: Inputs, operands: list[Tensor], **changed: Any) -> Found:
        """By the CPU's implementation, or the kernels."""
        run = {"cpu": progressive_attention.forward_cpu, "kernel": progressive_attention.launch}
        case = dataclasses.replace(self, **changed)
        return Found(*run[way](*inputs, operands, self.program.encode(), *case.options()))


CASES = {
    "plain": Case(lengths=(210, 1, 0), heads=2),
    "random": Case(kind="random"),
    "group-1": Case(heads=3, group=1),
    "group-4-D128": Case(group=4, dim=128, std=0.5),
    "group-7-D80": Case(group=7, dim=80),
    "group-8-D64": Case(group=8, dim=64),
    "group-16-D96": Case(group=16, dim=96),
    "group-20": Case(group=20),
    "D256-page-32": Case(dim=256, page=32),
    "page-64": Case(page=64, lengths=(600, 63)),
    "many-pages": Case(lengths=(2500,), entries=160, group=2, p=0.8),  # shared by programs
    "large-logits": Case(kind="random", std=40.0),
    "outlier": Case(kind="outlier", std=2.0),
    "nothing-first": Case(sinks=0, local=0, p=0.5),
    "all": Case(p=1.0),
    "at-least": Case(p=0.1, min_pages=9),
    "at-most": Case(p=0.99, kind="random", max_pages=5),
    "window": Case(window=70),
    "soft-cap": Case(formulas=(("score", 5 * sympy.tanh(x / 5)),), std=2.0),
    "alibi": Case(formulas=(("score", x + Load(0, h) * (s - t) / 50),), operands=((3,),)),
    "padding": Case(formulas=(("keep", Load(0, b, s) > 0),), operands=((2, 224),)),
    "keeps-nothing": Case(formulas=(("keep", s > t),)),
}  # fmt: skip


def logits(case: Case, inputs: Inputs, operands: list[Tensor]) -> Tensor:
    """All real logits in float64, [B, Hkv, G, S]."""
    from sparse_compile.kernels.paged_attention import masked_logits
    from sparse_compile.kernels.paged_cache import paged_gather_ref

    q, pool, *operands = in_dtype([inputs.q, inputs.pool, *operands], torch.float64)
    n_keys = inputs.table.shape[1] * pool.shape[3]
    k, _ = paged_gather_ref(pool, inputs.table, inputs.lengths, n_keys)
    position = inputs.lengths.long()[:, None] - 1
    found, _ = masked_logits(
        q, k, inputs.lengths, position, operands, case.program, False, case.window
    )
    return found[:, :, 0].unflatten(1, (case.heads, case.group))


def true_mass(case: Case, inputs: Inputs, operands: list[Tensor], found: Found) -> Tensor:
    """The share of the exact softmax on the pages read, [B, Hkv, G]; 1 where there is no key."""
    all_logits = logits(case, inputs, operands)
    weights = all_logits.softmax(-1).nan_to_num(0.0).unflatten(-1, (-1, case.page)).sum(-1)
    weights = torch.nn.functional.pad(weights, (0, 1))  # of no page, for -1
    at = found.pages.long()
    at = at.where(at >= 0, weights.shape[-1] - 1)[:, :, None].expand(-1, -1, case.group, -1)
    no_key = (all_logits == -math.inf).all(-1)
    return weights.gather(-1, at).sum(-1).masked_fill(no_key, 1.0)


def check_lists(case: Case, inputs: Inputs, found: Found) -> None:
    """Lists name live pages once, those that come first among them, and -1 behind their end."""
    n_live = -(-inputs.lengths // case.page)
    for row, lists in enumerate(found.pages.tolist()):
        for head, listed in enumerate(lists):
            count = int(found.n_pages[row, head])
            read, live = set(listed[:count]), int(n_live[row])
            assert len(read) == count
            assert read <= set(range(live))
            assert set(listed[count:]) <= {-1}
            if case.window or case.formulas:
                continue
            first = set(range(min(case.sinks, live))) | set(range(max(0, live - case.local), live))
            assert first <= read
            assert count >= min(case.min_pages, live)
            assert not case.max_pages or count <= case.max_pages


def check_attention(case: Case, inputs: Inputs, operands: list[Tensor], found: Found) -> None:
    """The output is that of the reference for the pages that were read."""

    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = in_dtype([inputs.q, inputs.pool, *operands], dtype)
        return progressive_attention.progressive_attention_ref(
            wide[0], wide[1], inputs.table, inputs.lengths, wide[2:], case.program, case.window,
            found.pages, found.n_pages,
        )  # fmt: skip

    exact, rough = reference(torch.float64), reference(inputs.q.dtype)
    scores = logits(case, inputs, operands)
    score = float(scores[scores.isfinite()].abs().max()) if bool(scores.isfinite().any()) else 0.0
    is_rough = inputs.q.dtype == torch.bfloat16 and case.program.score.has(sympy.tanh)
    # weights are rounded to the dtype of the values, scores to float32 or as tanh is
    steps = (
        torch.finfo(inputs.q.dtype).eps,
        score * (TANH_STEP if is_rough else torch.finfo(torch.float32).eps),
    )
    largest = float(inputs.pool.nan_to_num(0.0).abs().max())
    assert_close_derived(found.out, exact[0], [rough[0], exact[0] + largest * sum(steps) / 2])
    natural = natural_lse(rough[1], exact[1], case.dim)
    assert_close_derived(found.lse, exact[1], [*natural, exact[1] + steps[1]], name="lse")
