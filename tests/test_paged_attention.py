"""Attention to pages computes what its reference says, whichever pages hold a sequence."""

import dataclasses
import math
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from sparse_compile import OperatorError, ops
from sparse_compile.expressions import Load, b, h, s, t, x
from sparse_compile.ir import ScoreProgram
from sparse_compile.kernels import paged_attention
from sparse_compile.testing import assert_close_derived, in_dtype

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options of one attention."""

    lengths: tuple[int, ...] = (37,)
    tokens: int = 1
    new: tuple[int, ...] | None = None
    heads: int = 2
    group: int = 3
    dim: int = 16
    page: int = 16
    entries: int = 4  # of the table
    causal: bool = True
    window: int = 0
    std: float = 1.0
    formulas: tuple[tuple[str, Any], ...] = ()
    operands: tuple[tuple[int, ...], ...] = ()  # shapes

    @property
    def program(self) -> ScoreProgram:
        return ScoreProgram(scale=self.dim**-0.5, **dict(self.formulas))

    def arguments(self) -> list[Any]:
        """What the operator takes before its program, in float32 on the CPU."""
        n_pages = sum(-(-n // self.page) for n in self.lengths) + 2
        pool = torch.randn(n_pages, self.heads, 2, self.page, self.dim) * self.std
        pages = iter(torch.randperm(n_pages).tolist())
        table = torch.full((len(self.lengths), self.entries), -1, dtype=torch.int32)
        for row, n in enumerate(self.lengths):
            for entry in range(-(-n // self.page)):
                table[row, entry] = next(pages)
        # heads behind tokens, as projections make them
        q = torch.randn(len(self.lengths), self.tokens, self.heads * self.group, self.dim)
        new = None if self.new is None else torch.tensor(self.new, dtype=torch.int32)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        operands = [torch.randn(shape) for shape in self.operands]
        return [q.transpose(1, 2) * self.std, pool, table, lengths, new, operands]

    def rest(self) -> tuple[bool, int]:
        return self.causal, self.window


ALIBI = (("score", x + Load(0, h) * (s - t)),)
CASES = {
    "decode": Case(lengths=(37, 1, 0, 64)),
    "decode-group-1": Case(lengths=(37, 16), heads=3, group=1),
    "decode-group-20": Case(lengths=(50,), heads=1, group=20),
    "chunk": Case(lengths=(45, 20), tokens=11),
    "chunk-ragged": Case(lengths=(45, 20, 7, 0), tokens=11, new=(11, 3, 7, 0)),
    "whole-prompt": Case(lengths=(29,), tokens=29),
    "not-causal": Case(lengths=(45, 20), tokens=5, causal=False),
    "window": Case(lengths=(61, 5), tokens=9, window=7),
    "window-decode": Case(lengths=(300,), entries=20, window=20),
    "many-keys": Case(lengths=(1900, 700), entries=128, heads=1, group=2),  # shared by programs
    "many-keys-sink": Case(
        lengths=(1900,), entries=128, heads=1, group=2, formulas=(("sink", Load(0, h)),),
        operands=((2,),),
    ),
    "dim-80": Case(dim=80, lengths=(33,), tokens=3),
    "dim-192": Case(dim=192, lengths=(33,), tokens=2),
    "dim-256-page-32": Case(dim=256, page=32, lengths=(65,), tokens=2),
    "page-64": Case(page=64, lengths=(129, 63), tokens=2),
    "alibi": Case(lengths=(40, 22), tokens=3, formulas=ALIBI, operands=((6,),)),
    "soft-cap": Case(
        lengths=(40,), tokens=3, formulas=(("score", 5 * sympy.tanh(x / 5)),), std=2.0
    ),
    "padding": Case(
        lengths=(40, 22), tokens=3, formulas=(("keep", Load(0, b, s) > 0),), operands=((2, 64),)
    ),
    "keeps-nothing": Case(lengths=(40,), tokens=3, formulas=(("keep", s > t),)),
    "sink": Case(lengths=(40, 0), tokens=3, formulas=(("sink", Load(0, h)),), operands=((6,),)),
    "constant-sink": Case(lengths=(40,), tokens=3, formulas=(("sink", sympy.Float(0.5)),)),
    "large-logits": Case(lengths=(60,), tokens=3, std=6.0),
}  # fmt: skip


def reference(case: Case, arguments: list[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, pool, *rest, operands = arguments
    q, pool, *operands = in_dtype([q, pool, *operands], dtype)
    return paged_attention.paged_attention_ref(q, pool, *rest, operands, case.program, *case.rest())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["cpu", pytest.param("kernel", marks=interpreted)])
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_reference_says(name: str, way: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    q, pool, *rest, operands = case.arguments()
    q, pool = q.to(dtype), pool.to(dtype)
    run = paged_attention.forward_cpu if way == "cpu" else paged_attention.launch
    found = run(q, pool, *rest, operands, case.program.encode(), *case.rest())
    exact = reference(case, [q, pool, *rest, operands], torch.float64)
    rough = reference(case, [q, pool, *rest, operands], dtype)
    largest = float(pool.abs().max())
    step = torch.finfo(dtype).eps
    # weights are rounded to the dtype of the values
    assert_close_derived(found[0], exact[0], [rough[0], exact[0] + largest * step / 2])
    finite = exact[1].isfinite()
    logit = float(exact[1][finite].abs().max()) if bool(finite.any()) else 0.0
    natural = exact[1] + (logit + case.dim**0.5) * torch.finfo(torch.float32).eps
    assert_close_derived(found[1], exact[1], [rough[1], natural], name="lse")


def test_tiles_of_queries_on_the_cpu_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["chunk-ragged"]
    arguments = case.arguments()
    whole = paged_attention.forward_cpu(*arguments, case.program.encode(), *case.rest())
    monkeypatch.setattr(paged_attention, "TILE_NUMBERS", 1)
    cut = paged_attention.forward_cpu(*arguments, case.program.encode(), *case.rest())
    for ours, theirs in zip(cut, whole, strict=True):
        torch.testing.assert_close(ours, theirs)


@interpreted
@pytest.mark.parametrize("name", ["chunk-ragged", "many-keys", "window"])
def test_neither_pages_nor_neighbours_change_a_bit(name: str) -> None:
    case = CASES[name]
    q, pool, table, lengths, new, operands = case.arguments()
    rest = (operands, case.program.encode(), *case.rest())
    out, lse = paged_attention.launch(q, pool, table, lengths, new, *rest)
    order = torch.randperm(pool.shape[0])
    moved = torch.full_like(pool, torch.nan)
    moved[order] = pool
    places = torch.where(table >= 0, order[table.clamp(min=0)].int(), table)
    again = paged_attention.launch(q, moved, places, lengths, new, *rest)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)
    some_new = None if new is None else new[:1]
    alone = paged_attention.launch(q[:1], pool, table[:1], lengths[:1], some_new, *rest)
    if name != "many-keys":  # there, more programs share the keys of a row when it is alone
        assert torch.equal(alone[0], out[:1])
    torch.testing.assert_close(alone[0], out[:1])


def test_pages_written_and_read_are_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 30, 16), *torch.randn(2, 1, 2, 30, 16)
    pool = torch.full((3, 2, 2, 16, 16), torch.nan)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    found = []
    for start, end in ((0, 17), (17, 18), (18, 30)):
        lengths = torch.tensor([end], dtype=torch.int32)
        ops.paged_append(k[:, :, start:end], v[:, :, start:end], pool, table, lengths)
        found.append(ops.paged_attention(q[:, :, start:end], pool, table, lengths))
    torch.testing.assert_close(torch.cat(found, dim=2), wanted)
    lengths = torch.tensor([30], dtype=torch.int32)
    some, lse = ops.paged_attention(
        q[:, :, -2:], pool, table, lengths, mask=sympy.Ne(s, 3), score=x + 1, return_lse=True
    )
    scores = (q[:, :, -2:] @ k.repeat_interleave(2, 1).mT) / 4 + 1
    keep = torch.ones(2, 30, dtype=torch.bool).tril(28)
    keep[:, 3] = False
    scores = scores.masked_fill(~keep, -math.inf)
    torch.testing.assert_close(some, scores.softmax(-1) @ v.repeat_interleave(2, 1))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("name", ["decode", "chunk-ragged", "alibi"])
def test_the_operator_is_registered_as_it_should_be(name: str) -> None:
    case = CASES[name]
    torch.library.opcheck(
        torch.ops.sparse_compile.paged_attention_v1.default,
        (*case.arguments(), case.program.encode(), *case.rest()),
    )


POOL, TABLE = torch.zeros(4, 2, 2, 16, 8), torch.tensor([[0, 1]], dtype=torch.int32)
GIVEN = {
    "q": torch.zeros(1, 4, 3, 8), "pool": POOL, "block_table": TABLE,
    "seq_lens": torch.tensor([20], dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"q": torch.zeros(1, 4, 3, 16)}, r"q has shape .* Expected \[1, Hq, T, 8\]"),
        ({"q": torch.zeros(1, 3, 3, 8)}, "q has 3 heads. Expected a multiple of the 2 KV heads"),
        (
            {"q": torch.zeros(1, 4, 3, 8).half()},
            "q is torch.float16 on cpu. Expected torch.float32",
        ),
        ({"q": torch.zeros(1, 4, 3, 8, requires_grad=True)}, r"q requires grad.*torch.no_grad\(\)"),
        (
            {"seq_lens": torch.tensor([2], dtype=torch.int32)},
            r"seq_lens\[0\] is 2. .* the 3 tokens",
        ),
        ({"block_table": TABLE + 3}, r"block_table\[0, 1\] is 4. Expected a page from 0 to 3"),
        (
            {"n_new": torch.tensor([4], dtype=torch.int32)},
            r"n_new\[0\] is 4. Expected 0 to 3, the tokens of this call",
        ),
        ({"window": 0}, "window is 0. Expected 1 or more, or None"),
        ({"mask": s + t}, "mask is s . t. Expected a Boolean"),
        ({"mask": Load(0, s) > 0}, "operands holds 0 tensors"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(OperatorError, match=says):
        ops.paged_attention(**(GIVEN | changed))
