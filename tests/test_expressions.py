"""Expressions mean the same to `evaluate`, to `bounds`, to `derivative` and to plain arithmetic."""

import itertools
import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import sympy
import torch
from hypothesis import given, settings
from sympy import And, Eq, Ge, Gt, Le, Lt, Max, Min, Mod, Ne, Not, Or, Xor, floor
from torch import fx

from sparse_compile.evaluation import Source, evaluate, read_positions, slice_of
from sparse_compile.expressions import (
    Load,
    Truth,
    Where,
    b,
    cleared,
    derivative,
    h,
    is_predicate,
    s,
    t,
    whole_quotient,
    x,
)
from sparse_compile.intervals import bounds, load_extrema

ROWS, KEYS = 7, 9


def grid(rows=ROWS, keys=KEYS):
    return {t: torch.arange(rows)[:, None], s: torch.arange(keys)}


def by_hand(expr, point, operands):
    """The value of an expression at one element, in exact arithmetic."""

    def of(part):
        return by_hand(part, point, operands)

    if expr.is_Symbol:
        return Fraction(point[expr])
    if expr in (sympy.true, sympy.false):
        return bool(expr)
    if expr.is_Rational:
        return Fraction(int(expr.p), int(expr.q))
    args = [of(arg) for arg in expr.args]
    plain = {
        "Add": sum,
        "Mul": math.prod,
        "Pow": lambda a: a[0] ** int(a[1]),
        "floor": lambda a: Fraction(math.floor(a[0])),
        "Mod": lambda a: a[0] % a[1],
        "Abs": lambda a: abs(a[0]),
        "sign": lambda a: (a[0] > 0) - (a[0] < 0),
        "Max": max,
        "Min": min,
        "And": all,
        "Or": any,
        "Not": lambda a: not a[0],
        "Xor": lambda a: sum(a) % 2 == 1,
        "Where": lambda a: a[1] if a[0] else a[2],
        "Truth": lambda a: int(a[0]),
        "Load": lambda a: Fraction(operands[int(a[0])][tuple(int(i) for i in a[1:])].item()),
        "Equality": lambda a: a[0] == a[1],
        "Unequality": lambda a: a[0] != a[1],
        "LessThan": lambda a: a[0] <= a[1],
        "StrictLessThan": lambda a: a[0] < a[1],
        "GreaterThan": lambda a: a[0] >= a[1],
        "StrictGreaterThan": lambda a: a[0] > a[1],
    }
    return plain[type(expr).__name__](args)


whole = st.integers(-6, 6)
positive = st.integers(1, 5)
leaves = st.one_of(
    st.sampled_from([t, s, Load(0, t), Load(0, s), Load(1), Load(2, t, s)]),
    whole.map(sympy.Integer),
)


def extend_numbers(inner):
    return st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] - p[1]),
        st.tuples(inner, whole).map(lambda p: p[0] * p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] * p[1]),
        st.tuples(inner, positive).map(lambda p: floor(p[0] / p[1])),
        st.tuples(inner, positive).map(lambda p: Mod(p[0], p[1])),
        st.tuples(inner, inner).map(lambda p: Max(*p)),
        st.tuples(inner, inner).map(lambda p: Min(*p)),
        inner.map(sympy.Abs),
        inner.map(sympy.sign),
        inner.map(lambda n: n**2),
        st.tuples(inner, inner, inner, whole).map(lambda p: Where(Lt(p[0], p[3]), p[1], p[2])),
        st.tuples(inner, inner).map(lambda p: Truth(Le(p[0], p[1]))),
    )


numbers = st.recursive(leaves, extend_numbers, max_leaves=5)
quotients = st.tuples(numbers, positive).map(lambda p: p[0] / p[1])
relations = st.tuples(
    st.sampled_from([Eq, Ne, Lt, Le, Gt, Ge]), st.one_of(numbers, quotients), quotients
).map(lambda p: p[0](p[1], p[2]))
predicates = st.recursive(
    relations,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: And(*p)),
        st.tuples(inner, inner).map(lambda p: Or(*p)),
        st.tuples(inner, inner).map(lambda p: Xor(*p)),
        inner.map(Not),
    ),
    max_leaves=3,
)
operand_values = st.lists(whole, min_size=KEYS, max_size=KEYS)


def operands_of(values):
    line = torch.tensor(values)
    return [line, line[0] + 2, (line[:ROWS, None] * line[None] > 0)]


@settings(max_examples=100, deadline=None)
@given(st.one_of(numbers, predicates), operand_values)
def test_evaluate_is_exact(expr, values):
    operands = operands_of(values)
    found = torch.as_tensor(evaluate(expr, grid(), operands)).expand(ROWS, KEYS)
    for i, j in itertools.product(range(ROWS), range(KEYS)):
        assert found[i, j].item() == by_hand(expr, {t: i, s: j}, operands), (expr, i, j)


@settings(max_examples=100, deadline=None)
@given(st.one_of(numbers, predicates), operand_values, st.integers(1, 4), st.integers(1, 4))
def test_bounds_are_never_too_tight(expr, values, row_block, key_block):
    operands = operands_of(values)
    shape = (-(-ROWS // row_block), -(-KEYS // key_block))
    blocks = {t: (ROWS, row_block, shape[0]), s: (KEYS, key_block, shape[1])}
    lengths = {t: ROWS, s: KEYS}
    intervals = {}
    for axis, (symbol, (length, size, _)) in enumerate(blocks.items()):
        low = torch.arange(0, length, size).view([-1 if i == axis else 1 for i in range(2)])
        intervals[symbol] = (low, (low + size - 1).clamp(max=length - 1))
    for load in expr.atoms(Load):
        if load.args[0] != 2:  # leaves one read that nothing is known about
            intervals[load] = load_extrema(
                operands[int(load.args[0])], load, blocks, lengths, torch.arange
            )
    low, high = (torch.as_tensor(end).expand(shape) for end in bounds(expr, intervals))
    true = torch.as_tensor(evaluate(expr, grid(), operands)).expand(ROWS, KEYS)
    for i, j in itertools.product(range(shape[0]), range(shape[1])):
        part = true[i * row_block : (i + 1) * row_block, j * key_block : (j + 1) * key_block]
        if is_predicate(expr):
            assert low[i, j] or not part.any(), ("possible", expr, i, j)
            assert part.all() or not high[i, j], ("certain", expr, i, j)
        else:
            numbers_of_part = part.double()  # the read of a Boolean is a number, 0 or 1
            assert low[i, j] <= numbers_of_part.min(), ("low", expr, i, j)
            assert high[i, j] >= numbers_of_part.max(), ("high", expr, i, j)


@pytest.mark.parametrize(
    ("keep", "partial", "full"),
    [
        (s <= t, [(0, 0), (1, 1), (2, 2)], [(1, 0), (2, 0), (2, 1)]),
        (And(s <= t, t - s < 4), [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)], []),
        (Eq(floor(s / 8), floor(t / 8)), [], [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)]),
        (sympy.Abs(t - s) < 1000, [], list(itertools.product(range(3), range(3)))),
        (
            And(s <= t, Eq(Load(0, s), Load(0, t))),
            [(0, 0), (1, 1), (2, 2)],
            [(1, 0)],
        ),
    ],
    ids=["causal", "window", "chunk", "symmetric", "document"],
)
def test_bounds_find_the_blocks_of_common_masks(keep, partial, full):
    document = torch.tensor([0] * 8 + [1] * 4)
    blocks = {t: (12, 4, 3), s: (12, 4, 3)}
    low = {t: torch.tensor([[0], [4], [8]]), s: torch.tensor([0, 4, 8])}
    intervals = {symbol: (value, value + 3) for symbol, value in low.items()}
    for load in keep.atoms(Load):
        intervals[load] = load_extrema(document, load, blocks, {t: 12, s: 12}, torch.arange)
    some, every = (torch.as_tensor(end).expand(3, 3) for end in bounds(keep, intervals))
    assert [tuple(pair) for pair in (some & ~every).nonzero().tolist()] == partial
    assert [tuple(pair) for pair in every.nonzero().tolist()] == full


def test_unknown_or_nan_contents_leave_everything_possible():
    keep = Load(0, s) > 1.5
    block = {t: (torch.zeros(1), torch.ones(1)), s: (torch.zeros(1), torch.ones(1))}
    assert bounds(keep, block) == (True, False)
    nan = torch.tensor([math.nan])
    some, every = bounds(keep, {**block, Load(0, s): (nan, nan)})
    assert some.item()
    assert not every.item()


def test_reads_of_whole_numbers_bound_exactly():
    """A size that comes as an operand cuts blocks as sharply as a number does."""
    low = {t: torch.tensor([[0], [4]]), s: torch.tensor([0, 4, 8])}
    intervals = {symbol: (value, value + 3) for symbol, value in low.items()}
    blocks = {t: (8, 4, 2), s: (12, 4, 3)}
    for dtype, is_whole in ((torch.int64, True), (torch.float32, False)):
        size = torch.tensor(4, dtype=dtype)
        read = load_extrema(size, Load(0), blocks, {t: 8, s: 12}, torch.arange)
        some, _ = bounds(s < t + Load(0) + 1, {**intervals, Load(0): read})
        assert some.tolist() == [[True, True, not is_whole], [True, True, True]]
        # a sum that is rounded may lie on either side, so an end that only just fits is not certain
        _, every = bounds(s <= t + Load(0) - 1, {**intervals, Load(0): read})
        assert every.tolist() == [[is_whole, False, False], [True, is_whole, False]]


def test_large_positions_stay_whole():
    far = 2**53 + 1
    value = evaluate(floor((t + far) / 2) * 2 + Mod(t + far, 2), {t: torch.arange(4)})
    assert value.dtype == torch.int64
    assert value.tolist() == [far, far + 1, far + 2, far + 3]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32])
def test_small_integers_do_not_wrap(dtype):
    operand = torch.tensor([0, 1]).to(dtype)
    value = evaluate(Load(0, s) * 200 - 2 * Load(0, s) - 1, {s: torch.arange(2)}, [operand])
    assert value.tolist() == [-1, 197]


def test_fractions_are_computed_in_the_given_dtype():
    expr = sympy.Rational(1, 10) * (s - t) + sympy.exp(-s / sympy.Integer(3))
    for dtype in (torch.float32, torch.float64):
        value = evaluate(expr, {t: torch.tensor(3), s: torch.tensor(7)}, dtype=dtype)
        assert value.dtype == dtype
        assert value.item() == pytest.approx(0.4 + math.exp(-7 / 3), rel=torch.finfo(dtype).eps * 4)


def test_boolean_reads_are_used_as_they_are():
    mask = torch.tensor([True, False, True])
    env = {s: torch.arange(3)}
    for expr, wanted in [
        (Ne(Load(0, s), 0), mask),
        (Eq(Load(0, s), 0), ~mask),
        (Eq(Load(0, s), 1), mask),
        (Load(0, s) > sympy.Rational(1, 2), mask),
        (Not(And(Ne(Load(0, s), 0), s > 0)), torch.tensor([True, True, False])),
    ]:
        assert torch.equal(evaluate(expr, env, [mask]), wanted), expr


def test_positions_of_a_branch_not_taken_may_lie_outside():
    table = torch.tensor([10, 20, 30])
    joined = Where(s < 3, Load(0, s), Load(0, s - 3))
    env = {s: torch.arange(6)}
    assert evaluate(joined, env, [table]).tolist() == [10, 20, 30, 10, 20, 30]
    assert evaluate(Load(0, -s / 2 - s / 2 + 2), env, [table]).tolist()[:5] == [30, 20, 10, 30, 20]
    (position,) = read_positions(Load(0, 2 * s), env, [table])
    assert position.tolist() == [0, 2, 2, 2, 2, 2]


def test_reads_may_be_nested_and_broadcast():
    table, index = torch.randn(4, 3), torch.tensor([[2, 0], [1, 1]])
    env = {b: torch.arange(2)[:, None, None], h: torch.arange(3)[:, None], s: torch.arange(2)}
    value = evaluate(Load(0, Load(1, b, s) + 1, h), env, [table, index])
    for i, j, n in itertools.product(range(2), range(3), range(2)):
        assert value[i, j, n] == table[index[i, n] + 1, j]


def test_equal_subexpressions_are_computed_once():
    calls = []

    class Counted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.tanh:
                calls.append(1)
            return super().__torch_function__(function, types, args, kwargs or {})

    scores = torch.randn(3).as_subclass(Counted)
    cap = sympy.tanh(x / 30)
    evaluate(cap**2 + 3 * cap + Where(cap > 0, cap, 0), {x: scores})
    assert len(calls) == 1


def test_sizes_come_from_the_environment():
    size = sympy.Symbol("s0", integer=True, positive=True)
    expr = floor(size / 2) + s - Max(size, 3)
    for given_size in (10, torch.tensor(10), Source(torch.tensor(10), torch.int64, ())):
        assert evaluate(expr, {s: torch.arange(2), size: given_size}).tolist() == [-5, -4]
    with pytest.raises(KeyError, match="s0"):
        evaluate(expr, {s: torch.arange(2)})


def test_unknown_functions_are_refused():
    with pytest.raises(NotImplementedError, match="gamma"):
        evaluate(sympy.gamma(t), {t: torch.arange(2)})


def test_an_expression_prints_itself_into_a_graph():
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    inputs = {one: fx.Proxy(graph.placeholder(str(one)), tracer) for one in (x, t, s)}
    table = Source(fx.Proxy(graph.placeholder("table"), tracer), torch.float32, (5,))
    expr = Where(
        And(s <= t, Ne(Mod(t, 3), 1)),
        5 * sympy.tanh(x / 5) + Load(0, Min(sympy.Abs(t - s), 4)),
        -sympy.oo,
    )
    graph.output(evaluate(expr, inputs, [table]).node)
    module = fx.GraphModule({}, graph)
    values = {x: torch.randn(ROWS, KEYS), **grid()}
    operand = torch.randn(5)
    assert torch.equal(module(*values.values(), operand), evaluate(expr, values, [operand]))


@pytest.mark.parametrize(
    "expr",
    [
        3 * x + 2,
        x**2 * Load(0, s) - x / (1 + x**2),
        30 * sympy.tanh(x / 30) + Load(0, t) * (s - t),
        Where(s <= t, x * Load(0, s), Load(0, t)),
        Max(x, Load(0, s), sympy.Rational(-1, 2)),
        Min(x, sympy.Rational(1, 2)) + sympy.Abs(x),
        sympy.exp(-sympy.Abs(x)) * sympy.log(1 + x**2) + sympy.sqrt(1 + x**2),
        Load(0, s) ** 3 * floor(x) + Truth(x > 0) * x,
        2 ** (x * Load(0, t)),
    ],
    ids=str,
)
def test_derivative_is_what_autograd_finds(expr):
    scores = torch.randn(ROWS, KEYS, dtype=torch.float64, requires_grad=True)
    operand = torch.randn(KEYS, dtype=torch.float64, requires_grad=True)
    env = {x: scores, **grid()}
    value = evaluate(expr, env, [operand], dtype=torch.float64).expand(ROWS, KEYS)
    upstream = torch.randn(ROWS, KEYS, dtype=torch.float64)
    wanted = torch.autograd.grad((value * upstream).sum(), [scores, operand], allow_unused=True)

    def slope(atom):
        found = evaluate(derivative(expr, atom), env, [operand], dtype=torch.float64)
        return upstream * torch.as_tensor(found).detach()

    with torch.no_grad():
        torch.testing.assert_close(slope(x), wanted[0])
        total = torch.zeros(KEYS, dtype=torch.float64)
        for load in expr.atoms(Load):
            (index,) = read_positions(load, env, [operand])
            total.index_put_((index.expand(ROWS, KEYS),), slope(load), accumulate=True)
        torch.testing.assert_close(
            total, torch.zeros_like(total) if wanted[1] is None else wanted[1]
        )


def test_a_slice_is_a_view_with_one_axis_per_index():
    operand = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    ranges = {b: (0, 2), h: (0, 7), t: (1, 3), s: (1, 4)}
    lengths = {b: 2, h: 7, t: 5, s: 4}
    part = slice_of(operand, Load(0, b, 1, s, t), ranges, lengths)
    assert part.shape == (2, 1, 2, 3)
    assert torch.equal(part[:, 0], operand[:, 1, 1:, 1:3].transpose(1, 2))
    assert part.untyped_storage().data_ptr() == operand.untyped_storage().data_ptr()
    assert slice_of(torch.tensor(3), Load(0), ranges, lengths).shape == (1, 1, 1, 1)
    assert slice_of(operand, Load(0, b, 1, s + 1, t), ranges, lengths) is None
    assert slice_of(operand, Load(0, b, 1, s, t), ranges, {**lengths, s: 5}) is None
    assert slice_of(operand[0, 0], Load(0, s, s), ranges, lengths) is None


def test_fractions_are_cleared_only_where_that_is_exact():
    assert whole_quotient(t / 8 - s / 8) == (t - s, 8)
    assert whole_quotient(0.5 * t) is None
    assert cleared(Le(t / 2, s / 3)) == (3 * t - 2 * s, 0)
    assert cleared(Le(t, s)) == (t, s)
    assert cleared(Le(t / 2, 0.25 * s)) == (t / 2, 0.25 * s)
