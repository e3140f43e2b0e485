"""Proven masks against the masks themselves, element by element, at several sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_compile.evaluation import evaluate
from sparse_compile.expressions import Load, Where, b, h, s, t
from sparse_compile.passes.elements import ElementEvaluator, Unproven
from sparse_compile.passes.prove_mask import (
    DROP,
    TermProof,
    classify,
    is_dense_load,
    normalise,
    prove_additive,
    prove_boolean,
    row_may_be_empty,
)
from sparse_compile.passes.shapes import shape_of

MIN = torch.finfo(torch.float32).min
INF = float("inf")


class Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        self.values[node] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


class Proven(NamedTuple):
    module: fx.GraphModule
    evaluator: ElementEvaluator
    proof: TermProof
    ranges: dict[sympy.Symbol, sympy.Expr]

    @property
    def text(self) -> str:
        names = [node.name for node in self.evaluator.operands]
        return " & ".join(map(str, classify(self.proof.keep, self.ranges, names)))


def prove(
    program: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    mode: str,
    buffers: tuple[int, ...] = (),
) -> Proven:
    module = make_fx(program, pre_dispatch=True, tracing_mode=mode)(*inputs)
    out = module.graph.output_node().args[0]
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    constants = {n: getattr(module, n.target) for n in module.graph.find_nodes(op="get_attr")}
    constants |= {placeholders[number]: inputs[number] for number in buffers}
    evaluator = ElementEvaluator(constants)
    shape = shape_of(out)
    index = (b, h, t, s)[4 - len(shape) :]
    found = evaluator.element(out, index)
    ranges = dict(zip(index, shape, strict=True))
    boolean = out.meta["val"].dtype == torch.bool
    proof = (prove_boolean if boolean else prove_additive)(found, ranges)
    return Proven(module, evaluator, proof, ranges)


def assert_proof(proven: Proven, inputs: tuple[torch.Tensor, ...]) -> None:
    """keep, bias and fill say of every element what the program made it."""
    module, evaluator, proof, ranges = proven
    recorder = Recorder(module)
    wanted = recorder.run(*inputs)
    env: dict[sympy.Symbol, Any] = {}
    for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        for size, real in zip(node.meta["val"].shape, value.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                env[size.node.expr] = real
    for axis, symbol in enumerate(ranges):
        shape = [-1 if axis == other else 1 for other in range(wanted.ndim)]
        env[symbol] = torch.arange(wanted.shape[axis]).view(shape)
    operands = [recorder.values[node] for node in evaluator.operands]

    def grid(expr: sympy.Basic) -> torch.Tensor:
        value = evaluate(expr, env, operands, dtype=torch.float64)
        return torch.as_tensor(value).expand(wanted.shape)

    keep, bias = grid(proof.keep), grid(proof.bias)
    dropped = ~wanted if wanted.dtype == torch.bool else wanted <= DROP
    if proof.dense:
        assert bool((dropped | keep).all())
    else:
        assert torch.equal(~keep, dropped)
    if wanted.dtype != torch.bool and not proof.dense:
        torch.testing.assert_close(bias[keep].double(), wanted.double()[keep], rtol=1e-6, atol=1e-6)
        if proof.uniform and proof.fill is not None:
            assert bool((wanted[~keep] == proof.fill).all())
    if not row_may_be_empty(proof.keep, ranges) and not proof.dense:
        assert bool(keep.any(-1).all())


def check(
    program: Callable[..., torch.Tensor],
    *batches: tuple[torch.Tensor, ...],
    buffers: tuple[int, ...] = (),
) -> Proven:
    proven = prove(program, batches[0], "fake", buffers)
    assert_proof(proven, batches[0])
    text = proven.text
    proven = prove(program, batches[0], "symbolic", buffers)
    for inputs in batches:
        assert_proof(proven, inputs)
    assert proven.text == text
    return proven


def tokens(*sizes: tuple[int, int]) -> list[tuple[torch.Tensor]]:
    return [(torch.zeros(size),) for size in sizes]


SIZES = tokens((2, 9), (3, 12), (2, 5))


def positions(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None, :]


def _bart(x: torch.Tensor) -> torch.Tensor:
    mask = torch.full((x.shape[1], x.shape[1]), MIN)
    row = torch.arange(x.shape[1])
    mask.masked_fill_(row < (row + 1).view(-1, 1), 0)
    return mask[None, None].expand(x.shape[0], 1, x.shape[1], x.shape[1])


def _written(predicate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    return lambda x: predicate(*positions(x))


CAUSAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "compare": _written(lambda q, k: q >= k),
    "tril": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "triu-not": lambda x: ~torch.ones(x.shape[1], x.shape[1]).triu(1).bool(),
    "triu-inf": lambda x: torch.full((x.shape[1], x.shape[1]), -INF).triu(1),
    "triu-times": lambda x: torch.triu(torch.ones(x.shape[1], x.shape[1]) * -INF, diagonal=1),
    "one-minus": lambda x: (1.0 - torch.ones(x.shape[1], x.shape[1]).tril()) * -10000.0,
    "one-minus-min": lambda x: (1.0 - torch.ones(x.shape[1], x.shape[1]).tril()) * MIN,
    "where": lambda x: torch.where(positions(x)[0] < positions(x)[1], -1e9, 0.0),
    "bart": _bart,
    "masked-fill": lambda x: torch.zeros(x.shape[1], x.shape[1]).masked_fill(
        torch.ones(x.shape[1], x.shape[1]).tril() == 0, -INF
    ),
    "inverted-twice": lambda x: (1 - (1 - torch.ones(x.shape[1], x.shape[1]).tril())).bool(),
    "cumsum": lambda x: (
        torch.ones_like(x).cumsum(1)[:, None, :, None].long()
        >= torch.ones_like(x).cumsum(1)[:, None, None, :].long()
    ),
    "clamped": lambda x: (torch.full((x.shape[1], x.shape[1]), MIN).triu(1) * 2).clamp(min=MIN),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_however_it_is_written(name: str) -> None:
    proven = check(CAUSAL[name], *SIZES)
    assert proven.text == "causal"
    assert not row_may_be_empty(proven.proof.keep, proven.ranges)


STRUCTURES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "dense": (_written(lambda q, k: (q >= 0) & (k > -1)), ""),
    "nothing": (_written(lambda q, k: (q < 0) & (k >= 0)), "structural(False)"),
    "offset": (_written(lambda q, k: k <= q + 2), "causal(offset=2)"),
    "strict": (_written(lambda q, k: k < q), "causal(offset=-1)"),
    "window": (_written(lambda q, k: (k <= q) & (q - k < 3)), "causal & window(left=3)"),
    "window-xor": (
        lambda x: torch.bitwise_xor(
            torch.ones(x.shape[1], x.shape[1]).tril().bool(),
            torch.ones(x.shape[1], x.shape[1]).tril(-3).bool(),
        ),
        "causal & window(left=3)",
    ),
    "two-sided": (
        _written(lambda q, k: (q - k < 3) & (k - q <= 1)),
        "window(left=3, right=1)",
    ),
    "symmetric": (_written(lambda q, k: (q - k).abs() <= 2), "symmetric_window(2)"),
    "symmetric-strict": (_written(lambda q, k: (k - q).abs() < 3), "symmetric_window(2)"),
    "chunk": (_written(lambda q, k: (q // 4 == k // 4) & (k <= q)), "causal & chunk(4)"),
    "chunk-offset": (_written(lambda q, k: (q + 1) // 4 == (k + 1) // 4), "chunk(4, offset=1)"),
    "prefix": (_written(lambda q, k: (k < 3) | (k <= q)), "prefix(3)"),
    "dilated": (_written(lambda q, k: ((q - k) % 2 == 0) & (k <= q)), "causal & dilated(2)"),
    "strided": (_written(lambda q, k: q % 3 == k % 3), "dilated(3)"),
    "length": (_written(lambda q, k: (k < 4) & (q >= 0)), "kv_length(4)"),
    "blocks": (_written(lambda q, k: q // 2 == k // 3), "block_diagonal(floor(t/2) = floor(s/3))"),
    "tighter": (_written(lambda q, k: (k <= q) & (k <= q + 3)), "causal"),
    "contradiction": (_written(lambda q, k: (k < q) & (k > q)), "structural(False)"),
    "tautology": (_written(lambda q, k: (k <= q) | (k >= q)), ""),
    "common": (_written(lambda q, k: ((k <= q) & (k < 2)) | ((k <= q) & (q - k < 2))), None),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structural_masks(name: str) -> None:
    program, text = STRUCTURES[name]
    proven = check(program, *SIZES)
    if text is not None:
        assert proven.text == text
    assert not proven.proof.dense


def test_what_the_window_covers_is_no_window() -> None:
    proven = prove(_written(lambda q, k: (k <= q) & (q - k < 16)), SIZES[0], "fake")
    assert proven.text == "causal"


def test_keys_aligned_to_the_end() -> None:
    def program(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        length, total = q.shape[1], k.shape[1]
        return torch.ones(length, total, dtype=torch.bool).tril(diagonal=total - length)

    batches = [(torch.zeros(2, n), torch.zeros(2, m)) for n, m in ((3, 7), (5, 11))]
    proven = prove(program, batches[0], "symbolic")
    for inputs in batches:
        assert_proof(proven, inputs)
    (atom,) = classify(proven.proof.keep, proven.ranges)
    query, key = proven.ranges[t], proven.ranges[s]
    assert atom.kind == "causal"
    assert atom.predicate == sympy.Le(s, t + key - query)
    # keys may be fewer than queries for all that is known: then the first rows read nothing
    assert row_may_be_empty(atom.predicate, proven.ranges) == (prove_order(query, key) is None)
    assert not row_may_be_empty(sympy.Le(s, t + 4), {t: sympy.Integer(3), s: sympy.Integer(7)})


def prove_order(query: sympy.Expr, key: sympy.Expr) -> bool | None:
    return (key - query).is_nonnegative


def padding(*sizes: tuple[int, int], dtype: torch.dtype = torch.long) -> list[Any]:
    torch.manual_seed(0)
    masks = [(torch.rand(size) > 0.3).to(dtype) for size in sizes]
    return [(torch.zeros(size), mask) for size, mask in zip(sizes, masks, strict=True)]


PADDED = padding((2, 9), (3, 12), (2, 5))


def test_padding_by_where() -> None:
    def program(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return torch.where(causal & m[:, None, None, :].bool(), 0.0, MIN)

    proven = check(program, *PADDED)
    assert proven.text == "causal & key_padding(m_1)"
    assert proven.proof.fill == MIN
    assert proven.proof.absorbing
    assert proven.proof.uniform
    assert row_may_be_empty(proven.proof.keep, proven.ranges)


def test_padding_of_old_encoders_keeps_its_bias_unless_it_is_known_to_be_binary() -> None:
    def program(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (1.0 - m[:, None, None, :].to(x.dtype)) * MIN

    soft = (torch.zeros(2, 3), torch.tensor([[1, 0, 1], [1, 1, 2]]))
    proven = check(program, *PADDED, soft)
    assert proven.text == "key_padding(m_1)"
    assert proven.proof.bias.has(Load)
    assert proven.proof.fill == MIN
    value = proven.evaluator.element(proven.module.graph.output_node().args[0], (b, h, t, s))
    binary = prove_additive(value, proven.ranges, binary=[0])
    assert binary.keep == sympy.Ne(Load(0, b, s), 0)
    assert binary.bias == 0
    assert binary.uniform


def test_query_and_key_padding() -> None:
    def program(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        both = m[:, None, None, :] * m[:, None, :, None]
        return both.bool()

    assert check(program, *PADDED).text == "key_padding(m_1) & query_padding(m_1)"


def test_documents() -> None:
    def program(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        document = m.cumsum(1)
        same = document[:, None, :, None] == document[:, None, None, :]
        return same & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()

    proven = check(program, *PADDED)
    assert proven.text == "causal & document(cumsum)"
    assert not row_may_be_empty(proven.proof.keep, proven.ranges)


def test_padding_twice() -> None:
    """Two masks added: what both drop is twice as low, and no longer uniform."""

    def program(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        causal = torch.full((x.shape[1], x.shape[1]), -10000.0).triu(1)
        return causal + torch.where(m.bool(), 0.0, -10000.0)[:, None, None, :]

    proven = check(program, *PADDED)
    assert proven.text == "causal & key_padding(m_1)"
    assert proven.proof.fill == -10000.0
    assert not proven.proof.uniform
    assert not proven.proof.absorbing


def test_lengths() -> None:
    def program(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return (torch.arange(x.shape[1]) < n[:, None])[:, None, None, :]

    batches = [
        (torch.zeros(2, 6), torch.tensor([3, 6])),
        (torch.zeros(3, 4), torch.tensor([0, 2, 4])),
    ]
    assert check(program, *batches).text == "kv_length(n_1[b])"


def test_static_cache_positions() -> None:
    def program(x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        query = torch.arange(x.shape[0]) + start
        key = torch.arange(x.shape[1])
        return (key <= query[:, None]) & (key > query[:, None] - 4)

    batches = [(torch.zeros(3, 10), torch.tensor(2)), (torch.zeros(2, 7), torch.tensor(5))]
    proven = check(program, *batches)
    assert proven.text == "kv_length(t + start_1 + 1) & data(s > t + start_1 - 4)"


def test_decoding_one_token() -> None:
    def program(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return (torch.arange(x.shape[1]) <= position[:, None])[None, None]

    batches = [(torch.zeros(2, 10), torch.tensor([4]))]
    proven = check(program, *batches)
    assert proven.text == "kv_length(position_1[0] + 1)"


def test_a_relative_bias_is_a_bias() -> None:
    def program(x: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        query, key = positions(x)
        alibi = slopes[:, None, None] * (key - query)
        return torch.where(key <= query, alibi, -INF)

    batches = [(torch.zeros(2, 6), torch.randn(4)), (torch.zeros(2, 9), torch.randn(3))]
    proven = check(program, *batches)
    assert proven.text == "causal"
    assert sympy.expand(proven.proof.bias - Load(0, h) * (s - t)) == 0
    assert not proven.proof.dense


def test_alibi_by_powers() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        slopes = torch.pow(0.5, torch.arange(1, 5))
        return slopes[:, None, None] * positions(x)[1] + torch.full((x.shape[1],) * 2, -INF).triu(1)

    proven = check(program, *SIZES)
    assert proven.text == "causal"
    assert not proven.proof.bias.has(Load)


def test_a_mask_that_was_given_is_dense() -> None:
    def program(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()

    batches = [(torch.zeros(2, n), torch.rand(2, 1, n, n) > 0.5) for n in (4, 6)]
    proven = check(program, *batches)
    assert proven.proof.dense
    assert proven.text == "causal"


def test_a_bias_that_was_given_is_dense() -> None:
    def program(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return bias + torch.full((x.shape[1], x.shape[1]), MIN).triu(1)

    batches = [(torch.zeros(2, n), torch.randn(2, 3, n, n)) for n in (4, 6)]
    proven = check(program, *batches)
    assert proven.proof.dense
    assert proven.text == "causal"
    assert is_dense_load(proven.proof.bias)


def test_a_buffer_of_gpt2() -> None:
    def program(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        return torch.where(buffer[:, :, 3 : 3 + n, : 3 + n], 0.0, torch.full([], MIN))

    buffer = torch.ones(32, 32, dtype=torch.bool).tril().view(1, 1, 32, 32)
    batches = [(torch.zeros(2, 6), buffer), (torch.zeros(2, 9), buffer)]
    proven = check(program, *batches, buffers=(1,))
    assert proven.text == "causal(offset=3)"
    assert [node.name for node in proven.evaluator.value_guards] == ["buffer_1"]


def test_nan_is_unproven() -> None:
    """0 * -inf where nothing is masked: the model is broken, and so would be the proof."""
    condition = sympy.Le(s, t)
    with pytest.raises(Unproven, match="nan"):
        prove_additive(sympy.nan + Where(condition, 0, 1), {s: 4, t: 4})
    program = _written(lambda q, k: (1.0 - (k <= q).float()) * -INF)
    assert prove_is_dense_or_refused(program)


def prove_is_dense_or_refused(program: Callable[..., torch.Tensor]) -> bool:
    try:
        return prove(program, SIZES[0], "fake").proof.dense
    except Unproven:
        return True


def test_a_bias_may_bring_back_what_a_small_number_drops() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        query, key = positions(x)
        return torch.where(key <= query, 0.0, -10000.0) + 1000.0 * key

    proven = check(program, *SIZES)
    assert proven.text == "structural((s >= 1) | (s <= t))"


def test_small_numbers_are_a_bias() -> None:
    proven = check(_written(lambda q, k: torch.where(k <= q, 0.0, -100.0)), *SIZES)
    assert proven.proof.fill is None
    assert proven.proof.bias == Where(sympy.Le(s - t, 0), 0, -100) or proven.proof.bias.has(Where)


def _transformers_masks() -> dict[str, Any]:
    return {
        "causal": ({}, "create_causal_mask"),
        "window": ({"sliding_window": 3}, "create_sliding_window_causal_mask"),
        "chunk": ({"attention_chunk_size": 4}, "create_chunked_causal_mask"),
        "bidirectional": ({}, "create_bidirectional_mask"),
        "bidirectional-window": ({"sliding_window": 2}, "create_bidirectional_sliding_window_mask"),
    }


EXPECTED = {
    "causal": ("causal", "causal & key_padding(m_1)"),
    "window": ("causal & window(left=3)", "causal & window(left=3) & key_padding(m_1)"),
    "chunk": (
        "causal & chunk(4)",
        "causal & key_padding(m_1) & data(Eq(floor(s/4 - sum_1[b]/4), floor(t/4 - sum_1[b]/4)))",
    ),
    "bidirectional": ("", "key_padding(m_1)"),
    "bidirectional-window": ("symmetric_window(2)", "symmetric_window(2) & key_padding(m_1)"),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", EXPECTED)
def test_masks_of_transformers(
    name: str, padded: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    from transformers import LlamaConfig

    options, function = _transformers_masks()[name]
    config = LlamaConfig(**options)
    config._attn_implementation = implementation
    create = getattr(masking, function)
    # as under torch.compile: no mask is left out after a look at its values
    for test in ("is_tracing", "is_torchdynamo_exporting"):
        monkeypatch.setattr(masking, test, lambda *_: True)

    def program(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = {"attention_mask": m if padded else None, "past_key_values": None}
        if not name.startswith("bidirectional"):
            given["position_ids"] = torch.arange(x.shape[1])[None]
        return create(config=config, inputs_embeds=x[..., None], **given)

    proven = check(program, *PADDED)
    assert proven.text == EXPECTED[name][padded]
    assert proven.proof.bias == 0
    assert not proven.proof.dense


CONCRETE = {t: sympy.Integer(6), s: sympy.Integer(8)}
T_SIZE, S_SIZE = sympy.symbols("s7 s9", integer=True, positive=True)
SYMBOLIC = {t: T_SIZE, s: S_SIZE}
small = st.integers(-9, 9)
relations = st.sampled_from([sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne])
sides = st.one_of(
    st.builds(lambda i, j, c: i * t + j * s + c, st.integers(-2, 2), st.integers(-2, 2), small),
    st.builds(lambda c, n: sympy.floor((t + c) / n) - sympy.floor(s / n), small, st.integers(2, 4)),
    st.builds(lambda c, n: sympy.Mod(t - s + c, n), small, st.integers(2, 4)),
    st.builds(lambda c: sympy.Abs(t - s) + c, small),
    st.builds(lambda c: t - s + S_SIZE - T_SIZE + c, small),
    st.builds(lambda c: s - T_SIZE + c, small),
)
literals = st.builds(lambda relation, side, c: relation(side, c), relations, sides, small)
predicates = st.recursive(
    literals,
    lambda parts: st.one_of(
        st.builds(sympy.And, parts, parts),
        st.builds(sympy.Or, parts, parts),
        st.builds(sympy.Not, parts),
    ),
    max_leaves=5,
)


@given(predicate=predicates, sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)))
@settings(max_examples=250, deadline=None)
def test_normal_forms_mean_the_same(predicate: sympy.Basic, sizes: tuple[int, int]) -> None:
    n_queries, n_keys = sizes
    env = {
        t: torch.arange(n_queries)[:, None],
        s: torch.arange(n_keys)[None, :],
        T_SIZE: n_queries,
        S_SIZE: n_keys,
    }

    def grid(expr: sympy.Basic) -> torch.Tensor:
        return torch.as_tensor(evaluate(expr, env)).expand(n_queries, n_keys)

    wanted = grid(predicate)
    fixed = {t: sympy.Integer(n_queries), s: sympy.Integer(n_keys)}
    for ranges in (SYMBOLIC, fixed):
        normal = normalise(predicate, ranges)
        assert torch.equal(grid(normal), wanted), normal
        atoms = classify(predicate, ranges)
        assert torch.equal(grid(sympy.And(*(atom.predicate for atom in atoms))), wanted), atoms
        if not row_may_be_empty(predicate, ranges):
            assert bool(wanted.any(-1).all())


def test_too_many_cases_are_unproven() -> None:
    value = sympy.Add(*(Where(sympy.Ne(Load(i, s), 0), i + 1, 0) for i in range(12)))
    with pytest.raises(Unproven, match="cases"):
        prove_additive(value, CONCRETE)
