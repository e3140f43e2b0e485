"""The operator computes what `program_attention_ref` says, forward and backward."""

import math

import msgspec
import pytest
import sympy
import torch
from sympy import Abs, And, Eq, Min, Ne, Or, floor

from sparse_compile.errors import OperatorError
from sparse_compile.expressions import Load, Where, b, h, s, t, x
from sparse_compile.ir import ScoreProgram
from sparse_compile.kernels import program_attention_cpu as tiled
from sparse_compile.kernels.program_attention import program_attention, program_attention_ref
from sparse_compile.testing import assert_close_derived, in_dtype, random_heads

BATCH, HEADS, ROWS, KEYS = 2, 6, 37, 45
CAUSAL = s <= t


def slopes():
    return torch.rand(HEADS, requires_grad=True)


def documents():
    return torch.arange(KEYS).expand(BATCH, KEYS) // torch.tensor([[9], [14]])


def padding():
    return torch.arange(KEYS) >= torch.tensor([[0], [11]])


def bias():
    return torch.randn(BATCH, 1, ROWS, KEYS, requires_grad=True)


def table():
    return torch.randn(10, HEADS, requires_grad=True)


def scalar():
    return torch.randn((), requires_grad=True)


# name: (formulas, makers of the operands)
PROGRAMS = {
    "dense": ({}, []),
    "causal": ({"keep": CAUSAL}, []),
    "causal-with-offset": ({"keep": s <= t + (KEYS - ROWS)}, []),
    "window": ({"keep": And(CAUSAL, t - s < 7)}, []),
    "symmetric-window": ({"keep": Abs(t - s) <= 5}, []),
    "chunk": ({"keep": And(CAUSAL, Eq(floor(t / 8), floor(s / 8)))}, []),
    "prefix": ({"keep": Or(CAUSAL, s < 5)}, []),
    "document": ({"keep": And(CAUSAL, Eq(Load(0, b, t), Load(0, b, s)))}, [documents]),
    "per-head": ({"keep": And(CAUSAL, t - s < 3 * h + 1)}, []),
    "key-padding": ({"keep": And(CAUSAL, Ne(Load(0, b, s), 0))}, [padding]),
    "soft-cap": ({"keep": CAUSAL, "score": 3 * sympy.tanh(x / 3)}, []),
    "alibi": ({"keep": CAUSAL, "score": x + Load(0, h) * (s - t)}, [slopes]),
    "soft-cap-then-alibi": ({"score": 3 * sympy.tanh(x / 3) + Load(0, h) * (s - t)}, [slopes]),
    "sink": ({"keep": And(CAUSAL, t - s < 9), "sink": Load(0, h)}, [slopes]),
    "bias": ({"score": x + Load(0, b, 0, t, s)}, [bias]),
    "relative-bias": ({"score": x + Load(0, Min(Abs(t - s), 9), h)}, [table]),
    "two-reads": ({"score": x * Load(0, 3, h) + Load(0, Min(s, 9), 1)}, [table]),
    "learned-scale": ({"score": x * sympy.exp(Load(0)), "keep": CAUSAL}, [scalar]),
    "weight": ({"keep": CAUSAL, "weight": Load(0, h) * (s + 1)}, [slopes]),
    "no-scores": ({"score": Load(0, b, 0, t, s), "keep": CAUSAL}, [bias]),
    "branch": ({"score": Where(s < 3, x, x * x + Load(0, h))}, [slopes]),
}
EMPTY = And(s <= t - 3, t - s < 9)  # rows 0 to 2 keep nothing


def inputs(group=3, rows=ROWS, keys=KEYS, size=8, value_size=5, layout="contiguous"):
    kv_heads = HEADS // group
    shapes = [(HEADS, rows, size), (kv_heads, keys, size), (kv_heads, keys, value_size)]
    return [
        random_heads(BATCH, *shape, layout=layout, requires_grad=True, dtype=torch.float64)
        for shape in shapes
    ]


def results(function, tensors, upstream, program):
    """The output, and the gradient of everything that requires one."""
    q, k, v, *operands = tensors
    out = function(q, k, v, operands, program)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    grads = torch.autograd.grad(
        out, leaves, upstream.to(out.dtype), allow_unused=True, materialize_grads=True
    )
    return [out, *grads]


def operator(*args, **kwargs):
    return program_attention(*args, **kwargs)[0]


def shuffled_ref(q, k, v, operands, program):
    """The reference, with all its sums in some other order."""
    features, values, rows, keys = (
        torch.randperm(n) for n in (q.shape[3], v.shape[3], q.shape[2], k.shape[2])
    )
    places = {t: Load(len(operands), t), s: Load(len(operands) + 1, s)}
    formulas = {name: getattr(program, name) for name in ("score", "keep", "sink", "weight")}
    moved = {name: one.xreplace(places) for name, one in formulas.items() if one is not None}
    out = program_attention_ref(
        q[:, :, rows][..., features],
        k[:, :, keys][..., features],
        v[:, :, keys][..., values],
        [*operands, rows, keys],
        msgspec.structs.replace(program, **moved),
    )
    return out[:, :, rows.argsort()][..., values.argsort()]


def check(tensors, program, dtype):
    """Compare with the reference, with the error that the reference itself has in `dtype`."""
    tensors = in_dtype(tensors, dtype)
    upstream = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3]).to(dtype)
    truth = results(program_attention_ref, in_dtype(tensors, torch.float64), upstream, program)
    working = in_dtype(tensors, torch.float32 if dtype == torch.float64 else dtype)
    naturals = [results(shuffled_ref, working, upstream, program) for _ in range(4)]
    found = results(operator, tensors, upstream, program)
    for i, (one, true, *roughs) in enumerate(zip(found, truth, *naturals, strict=True)):
        assert one.dtype == dtype
        assert_close_derived(one, true, roughs, name=f"output {i}")


@pytest.fixture(params=[8, 128], ids=["block8", "block128"])
def block(request, monkeypatch):
    """Small blocks cut key ranges at these sizes; small tiles split blocks of rows."""
    monkeypatch.setattr(tiled, "BLOCK", request.param)
    if request.param == 8:
        monkeypatch.setattr(tiled, "TILE_NUMBERS", 1)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_in_float64(name, block):
    formulas, makers = PROGRAMS[name]
    check(
        [*inputs(), *(make() for make in makers)],
        ScoreProgram(scale=0.3, **formulas),
        torch.float64,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["window", "soft-cap-then-alibi", "sink"])
def test_working_dtypes(name, dtype):
    formulas, makers = PROGRAMS[name]
    check([*inputs(), *(make() for make in makers)], ScoreProgram(scale=0.3, **formulas), dtype)


@pytest.mark.parametrize("layout", ["token_major", "padded"])
@pytest.mark.parametrize("group", [1, 2, 6])
def test_groups_and_layouts(group, layout):
    check(inputs(group=group, layout=layout), ScoreProgram(scale=0.3, keep=CAUSAL), torch.float64)


@pytest.mark.parametrize(("rows", "keys"), [(1, 45), (37, 1), (1, 1), (130, 257)])
def test_odd_lengths(rows, keys):
    program = ScoreProgram(scale=0.3, keep=s <= t + (keys - rows), empty_rows="uniform")
    check(inputs(rows=rows, keys=keys), program, torch.float64)


@pytest.mark.parametrize("empty_rows", ["zero", "uniform", "nan"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_rows_without_keys(empty_rows, weighted, block):
    extra = {"weight": Load(0, h) * (s + 1)} if weighted else {}
    program = ScoreProgram(scale=0.3, keep=EMPTY, empty_rows=empty_rows, **extra)
    check([*inputs(), slopes()], program, torch.float64)
    q, k, v = inputs()
    out, lse = program_attention(q, k, v, [slopes().double()], program)
    assert lse[:, :, :3].eq(-math.inf).all()
    assert lse[:, :, 3:].isfinite().all()
    if empty_rows == "uniform" and not weighted:
        mean = v.mean(2, keepdim=True).repeat_interleave(3, dim=1).expand(-1, -1, 3, -1)
        torch.testing.assert_close(out[:, :, :3], mean)


@pytest.mark.parametrize("empty_rows", ["zero", "uniform", "nan"])
def test_a_sink_makes_rows_without_keys_zero(empty_rows, block):
    program = ScoreProgram(scale=0.3, keep=EMPTY, empty_rows=empty_rows, sink=Load(0, h))
    check([*inputs(), slopes()], program, torch.float64)
    sink = slopes().double()
    out, lse = program_attention(*inputs(), [sink], program)
    assert out[:, :, :3].eq(0).all()
    torch.testing.assert_close(lse[:, :, :3], sink[None, :, None].expand(2, -1, 3))


def test_no_keys_at_all():
    tensors = inputs(keys=0)
    for empty_rows in ("zero", "uniform", "nan"):
        out, lse = program_attention(*tensors, [], ScoreProgram(empty_rows=empty_rows))
        assert (out == 0).all() if empty_rows == "zero" else out.isnan().all()
        assert lse.eq(-math.inf).all()
    grads = torch.autograd.grad(operator(*tensors).sum(), tensors)
    assert all(grad.eq(0).all() for grad in grads)


def test_log_sum_exp_is_natural_and_has_no_gradient():
    q, k, v = inputs(group=1)
    _, lse = program_attention(q, k, v, [], ScoreProgram(scale=0.3, keep=CAUSAL))
    scores = (0.3 * q @ k.transpose(-1, -2)).masked_fill(
        torch.ones(ROWS, KEYS).triu(1).bool(), -math.inf
    )
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert not lse.requires_grad


def test_large_scores_stay_finite():
    q, k, v = (10 * tensor for tensor in inputs())
    check([q.detach().requires_grad_(), k, v], ScoreProgram(scale=4.0, keep=CAUSAL), torch.float32)


def test_keys_outside_a_window_are_never_read():
    q, k, v = (tensor.detach() for tensor in inputs(rows=300, keys=300))
    program = ScoreProgram(scale=0.3, keep=And(t >= 256, CAUSAL, t - s < 20))
    clean, _ = program_attention(q, k, v, [], program)
    for tensor in (k, v):
        tensor[:, :, :128] = math.nan
    found, _ = program_attention(q, k, v, [], program)
    assert torch.equal(found[:, :, 256:], clean[:, :, 256:])


def test_dropout_is_repeatable_unbiased_and_differentiated_with_its_own_mask():
    tensors = inputs(rows=20, keys=24)
    program = ScoreProgram(scale=0.3, keep=s <= t + 4)
    dense = operator(*tensors, [], program)
    runs = torch.stack(
        [operator(*tensors, [], program, dropout_p=0.4, seed=torch.tensor(i)) for i in range(400)]
    ).detach()
    assert torch.equal(
        runs[7], operator(*tensors, [], program, dropout_p=0.4, seed=torch.tensor(7)).detach()
    )
    assert not torch.equal(runs[7], runs[8])
    # the mean of n runs errs by a standard error; 5 of them at most among 1200 numbers
    deviation = runs.std(0) / math.sqrt(len(runs))
    assert ((runs.mean(0) - dense).abs() <= 5 * deviation + 1e-12).all()
    # with weights as values and the unit matrix as V, the output shows which weights survived
    q, k, _ = tensors
    unit = torch.eye(24, dtype=torch.float64).expand(BATCH, 2, 24, 24)
    kept = operator(q, k, unit, [], program, dropout_p=0.4, seed=torch.tensor(3))
    full = operator(q, k, unit, [], program)
    survivors = torch.where(full > 0, kept / full, 0.0).detach()
    assert set(survivors.unique().round(decimals=9).tolist()) == {0.0, round(1 / 0.6, 9)}
    share = (survivors > 0).sum() / (full > 0).sum()
    assert abs(share.item() - 0.6) < 0.03  # 4 standard deviations of 3000 draws
    # and autograd through these weights gives the gradients of the operator
    by_hand = full * survivors @ tensors[2].repeat_interleave(3, dim=1)
    upstream = torch.randn_like(by_hand)
    wanted = torch.autograd.grad((by_hand * upstream).sum(), tensors)
    out = operator(*tensors, [], program, dropout_p=0.4, seed=torch.tensor(3))
    torch.testing.assert_close(out, by_hand)
    torch.testing.assert_close(torch.autograd.grad((out * upstream).sum(), tensors), wanted)


def test_dropout_does_not_depend_on_tiles(monkeypatch):
    tensors = inputs()
    options = {"dropout_p": 0.3, "seed": torch.tensor(2**40 + 5)}
    whole = operator(*tensors, [], ScoreProgram(scale=0.3, keep=CAUSAL), **options)
    monkeypatch.setattr(tiled, "BLOCK", 8)
    pieces = operator(*tensors, [], ScoreProgram(scale=0.3, keep=CAUSAL), **options)
    torch.testing.assert_close(pieces, whole)


def test_dropout_of_everything_and_of_nothing():
    tensors, seed = inputs(), torch.tensor(1)
    assert operator(*tensors, dropout_p=1.0, seed=seed).eq(0).all()
    assert torch.equal(operator(*tensors, dropout_p=0.0, seed=seed), operator(*tensors))


def test_opcheck():
    formulas, makers = PROGRAMS["sink"]
    text = ScoreProgram(scale=0.3, **formulas).encode()
    q, k, v = in_dtype(inputs(), torch.float32)
    operands = [make() for make in makers]
    seed = torch.tensor(5)
    forward = torch.ops.sparse_compile.program_attention_v1.default
    torch.library.opcheck(forward, (q, k, v, operands, text, 0.1, seed))
    out, lse = forward(q, k, v, operands, text, 0.1, seed)
    plain = [tensor.detach() for tensor in (torch.randn_like(out), q, k, v)]
    torch.library.opcheck(
        torch.ops.sparse_compile.program_attention_backward_v1.default,
        (*plain, [one.detach() for one in operands], lse, text, 0.1, seed, [True]),
    )


def test_compiles_for_all_lengths_at_once():
    formulas, makers = PROGRAMS["alibi"]
    text, operands = ScoreProgram(scale=0.3, **formulas).encode(), [make() for make in makers]

    def model(q, k, v):
        return operator(q.sin(), k, v, operands, text).cos()

    def backend(graph, example_inputs):
        compilations.append(graph)
        return aot_eager(graph, example_inputs)

    compilations, counts = [], set()
    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for rows in (16, 23, 40):
        q, k, v = in_dtype(inputs(rows=rows), torch.float32)
        leaves = [q, k, v, *operands]
        wanted = torch.autograd.grad(model(q, k, v).sum(), leaves)
        found = torch.autograd.grad(compiled(q, k, v).sum(), leaves)
        torch.testing.assert_close(found, wanted)
        counts.add(len(compilations))
    assert len(counts) == 1


def test_second_derivatives_are_refused():
    q, k, v = inputs()
    (grad,) = torch.autograd.grad(operator(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"q": a["q"][0]}, r"q has shape \(6, 37, 8\).*four axes"),
        (lambda a: {"k": a["k"].float()}, r"k is torch.float32.*q is torch.float64"),
        (lambda a: {"v": a["v"].long()}, r"v is torch.int64"),
        (lambda a: {"k": a["k"][..., :4]}, r"k has shape .*Expected \[2, Hkv, S, 8\]"),
        (lambda a: {"k": a["k"].repeat(1, 2, 1, 1)}, r"k has 4 heads.*divides the 6 heads of q"),
        (lambda a: {"v": a["v"][:, :, :9]}, r"v has shape .*Expected \[2, 2, 45, Dv\]"),
        (lambda a: {"v": a["v"].to("meta")}, r"v is on meta. Expected cpu"),
        (lambda a: {"operands": []}, r"operands holds 0 tensors.*number 0 in Load\(0, h\)"),
        (lambda a: {"operands": [torch.zeros(2, 2)]}, r"operands\[0\] has shape \(2, 2\)"),
        (lambda a: {"operands": [torch.zeros(6, device="meta")]}, r"operands\[0\] is on meta"),
        (lambda a: {"dropout_p": 1.5}, r"dropout_p is 1.5"),
        (lambda a: {"dropout_p": 0.5}, r"seed is None.*int64"),
        (
            lambda a: {"program": ScoreProgram(keep=s <= t + sympy.Symbol("s0"))},
            r"program speaks of s0",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, message):
    q, k, v = inputs()
    given = {"q": q, "k": k, "v": v, "operands": [torch.zeros(HEADS)]}
    given["program"] = ScoreProgram(score=x + Load(0, h))
    with pytest.raises(OperatorError, match=message):
        program_attention(**{**given, **change(given)})


def test_derived_tolerance_notices_a_wrong_kernel():
    truth = torch.randn(50, dtype=torch.float64)
    natural = truth.float()
    assert_close_derived(truth.float(), truth, natural)
    wrong = truth.float().clone()
    wrong[3] += 1e-5
    with pytest.raises(AssertionError, match="1 of 50 elements are off"):
        assert_close_derived(wrong, truth, natural)
    wrong[3] = math.nan
    with pytest.raises(AssertionError, match="1 of 50 elements are off"):
        assert_close_derived(wrong, truth, natural)
    truth[3] = math.nan
    assert_close_derived(wrong, truth, truth.float())
