"""Formulas printed into Triton functions mean what `evaluate` and `bounds` say."""

from typing import Any

import pytest
import sympy
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.evaluation import evaluate
from sparse_compile.expressions import INDICES, Load, Where, b, h, s, t, x
from sparse_compile.ir import ScoreProgram
from sparse_compile.kernels import triton_functions as printed
from sparse_compile.kernels import triton_math
from sparse_compile.kernels.triton_text import Body, unprintable

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
N = 16


@triton.jit
def _keep_kernel(out_ptr, operands, places, b, h, first, KEEP: tl.constexpr, N: tl.constexpr):
    """A predicate of N queries from `first` on, and N keys."""
    i = tl.arange(0, N)
    keep = KEEP(b, h, first + i[:, None], i[None, :], operands, places)
    keep = keep & (i[:, None] >= 0) & (i[None, :] >= 0)
    tl.store(out_ptr + i[:, None] * N + i[None, :], keep)


@triton.jit
def _logit_kernel(x_ptr, out_ptr, operands, places, b, h, LOGIT: tl.constexpr, N: tl.constexpr):
    """A logit in base 2 and its slope."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    value = tl.load(x_ptr + at)
    logit, slope = LOGIT(value, b, h, i[:, None], i[None, :], operands, places)
    tl.store(out_ptr + at, logit + tl.zeros_like(value))
    tl.store(out_ptr + N * N + at, slope + tl.zeros_like(value))


def request_of(program: ScoreProgram, operands: list[Tensor]) -> printed.Request:
    q = torch.zeros(1, 4, N, 1)
    return printed.request(program.encode(), operands, q, q.shape[2], approximate=False)


def environment(first: int = 0) -> dict[Any, Tensor]:
    index = (torch.tensor([1]), torch.tensor([2]), first + torch.arange(N), torch.arange(N))
    views = ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, N, 1), (1, 1, 1, N))
    return {one: i.view(view) for one, i, view in zip(INDICES, index, views, strict=True)}


def printed_keep(keep: sympy.Basic, operands: list[Tensor], first: int = 0) -> Tensor:
    out = torch.zeros(N, N, dtype=torch.bool)
    function = printed.functions(request_of(ScoreProgram(keep=keep), operands)).keep
    arguments = printed.arguments(operands)
    _keep_kernel[(1,)](out.view(torch.uint8), *arguments, 1, 2, first, function, N)
    return out


def evaluated_keep(keep: sympy.Basic, operands: list[Tensor], first: int = 0) -> Tensor:
    found = torch.as_tensor(evaluate(keep, environment(first), operands))
    return found.expand(1, 1, N, N)[0, 0]


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(-3, 4, (2, N), generator=generator),
        torch.randint(-3, 4, (N,), generator=generator, dtype=torch.int32),
        torch.randint(0, 2, (2, N), generator=generator).bool(),
    ]


LOADS = (Load(0, b, s), Load(0, 1, t), Load(1, s), Load(1, sympy.Min(s + 1, N - 1)), Load(1, -1))
small = st.integers(-5, 5).map(sympy.Integer)
positive = st.integers(1, 7).map(sympy.Integer)
leaves = st.sampled_from([b, h, t, s, *LOADS]) | small
whole = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, c: a + c, inner, inner),
        st.builds(lambda a, c: a - c, inner, inner),
        st.builds(lambda a, c: a * c, inner, inner),
        st.builds(lambda a, c: sympy.floor(a / c), inner, positive),
        st.builds(sympy.Mod, inner, positive),
        st.builds(sympy.Abs, inner),
        st.builds(sympy.Max, inner, inner),
        st.builds(lambda a, c, d: Where(sympy.Gt(a, c), d, a), inner, inner, inner),
    ),
    max_leaves=6,
)
relations = st.builds(
    lambda relation, a, c: relation(a, c),
    st.sampled_from([sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge]), whole, whole,
) | st.just(sympy.Ne(Load(2, b, s), 0))  # fmt: skip
predicates = st.recursive(
    relations,
    lambda inner: st.one_of(
        st.builds(sympy.And, inner, inner), st.builds(sympy.Or, inner, inner),
        st.builds(sympy.Not, inner), st.builds(sympy.Xor, inner, inner),
    ),
    max_leaves=3,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(keep=predicates)
def test_predicates(keep: sympy.Basic) -> None:
    keep = ScoreProgram.decode(ScoreProgram(keep=keep).encode()).keep  # simplified again
    if keep in (sympy.true, sympy.false):
        return
    assert unprintable(keep) is None
    assert torch.equal(printed_keep(keep, operands()), evaluated_keep(keep, operands()))


def test_whole_numbers_past_32_bits() -> None:
    first = printed.SMALL_TOKENS - N
    keep = sympy.Eq(sympy.Mod((t + 5) * (t + s) * 3, 7), 2)
    assert torch.equal(printed_keep(keep, [], first), evaluated_keep(keep, [], first))
    assert evaluated_keep(keep, [], first).any()
    values = [torch.tensor([2**40, 2**31 - 1]), torch.tensor([2**31 - 1], dtype=torch.int32)]
    for load in (Load(0, 0), Load(0, 1), Load(1, 0)):
        keep = s + load > load + t
        assert torch.equal(printed_keep(keep, values), evaluated_keep(s > t, []))


LOGITS = {
    "plain": x * 2,
    "cap": 5 * sympy.tanh(x / 5),
    "slope": x + Load(0, h) * (s - t) / 3,
    "products": x * Load(0, h) * Load(0, 0) * Load(1, s) * t,
    "branch": Where(x > 0, sympy.exp(x / 9), sympy.Abs(x) * x),
    "pieces": sympy.Max(x, 1) - sympy.Min(x, Load(1, s)) + sympy.sqrt(1 + x**2),
    "waves": sympy.sin(x) + sympy.cos(t) * sympy.log(2 + s) + sympy.erf(x) + sympy.sinh(x / 9),
    "quotient": (x - s) / (1 + t),
    "powers": (x**2 + 1) ** sympy.Rational(2, 3) / (3 + x**2) ** 2,
    "constant": sympy.Integer(3),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_and_slopes(name: str) -> None:
    program = ScoreProgram(scale=0.7, score=LOGITS[name])
    given_ = [torch.rand(4), torch.randn(N)]
    raw = torch.randn(N, N) * 3
    out = torch.empty(2, N, N)
    function = printed.functions(request_of(program, given_)).logit_and_slope
    _logit_kernel[(1,)](raw, out, *printed.arguments(given_), 1, 2, function, N)
    score = (0.7 * raw.double()).requires_grad_()
    env = {**environment(), x: score[None, None]}
    exact = torch.as_tensor(
        evaluate(program.score, env, [one.double() for one in given_], dtype=torch.float64)
    )
    truth = exact.double().expand(1, 1, N, N)[0, 0]
    slope = torch.zeros(N, N)
    if program.score.has(x):
        (slope,) = torch.autograd.grad(truth.sum(), score)
    # some ten operations, each rounded, on numbers up to a hundred
    close = {"rtol": 2e-6, "atol": 2e-5}
    torch.testing.assert_close(out[0].double(), truth.detach() * printed.LOG2_E, **close)
    torch.testing.assert_close(out[1].double(), slope.double() * 0.7, **close)


@triton.jit
def _apply_kernel(x_ptr, out_ptr, FUNCTION: tl.constexpr, N: tl.constexpr):
    """N values of a function."""
    i = tl.arange(0, N)
    tl.store(out_ptr + i, FUNCTION(tl.load(x_ptr + i)))


@pytest.mark.parametrize("name", ["accurate", "fast"])
def test_tanh_is_as_close_as_said(name: str) -> None:
    values = torch.cat([torch.linspace(-12, 12, 2**12), torch.logspace(-6, 1, 2**12)])
    out = torch.empty_like(values)
    _apply_kernel[(1,)](values, out, getattr(triton_math, f"tanh_{name}"), 2**13)
    truth = values.double().tanh()
    error = (out.double() - truth).abs()
    if name == "accurate":
        assert (error / truth.abs()).max() <= 4 * torch.finfo(torch.float32).eps
    else:
        assert error.max() <= 3e-7


def test_one_function_for_one_program() -> None:
    asked = request_of(ScoreProgram(keep=s <= t), [])
    assert printed.functions(asked) is printed.functions(request_of(ScoreProgram(keep=s <= t), []))


def test_what_depends_on_no_element_is_multiplied_once() -> None:
    """ALiBi's slope and the logarithm's base meet before the tile does."""
    program = ScoreProgram(score=x + Load(0, h) * (s - t))
    asked = request_of(program, [torch.rand(4)])
    text = printed._score_text(asked, [printed.base_two_logit(program)])
    products = [line for line in text.splitlines() if "*" in line and "tl.load" not in line]
    assert len(products) == 3  # the slope's, the distance's, the score's
    assert "s.to(tl.float32)" in text  # whose differences are exact


def test_values_that_are_printed_are_not_known() -> None:
    with pytest.raises(TypeError, match="is not known"):
        bool(Body().constant(1) == 1)
