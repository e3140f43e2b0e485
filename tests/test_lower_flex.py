"""`emit_flex` writes what `program_attention_ref` computes, for `flex_attention`."""

import pytest
import sympy
import torch
from sympy import Abs, And, Eq, Min, Ne, floor
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from sparse_compile.expressions import Load, Where, b, h, s, t, x
from sparse_compile.ir import ScoreProgram
from sparse_compile.kernels.program_attention import program_attention_ref
from sparse_compile.passes import lower_flex
from sparse_compile.passes.lower_flex import emit_flex, flex_supported
from sparse_compile.testing import in_dtype, random_heads

BATCH, HEADS, KV_HEADS, SIZE, VALUE_SIZE = 2, 4, 2, 16, 24
FLEX = torch.ops.higher_order.flex_attention
CAUSAL = s <= t
DOCUMENT = And(CAUSAL, Eq(Load(0, b, t), Load(0, b, s)))
PADDING = And(CAUSAL, Ne(Load(0, b, s), 0))


def documents(rows, keys):
    return torch.arange(max(rows, keys)).expand(BATCH, -1) // torch.tensor([[90], [130]])


def padding(rows, keys):
    return torch.arange(keys) >= torch.tensor([[0], [140]])


def slopes(rows, keys):
    return torch.rand(HEADS, requires_grad=True)


def table(rows, keys):
    return torch.randn(10, HEADS, requires_grad=True)


def bias(rows, keys):
    return torch.randn(BATCH, 1, rows, keys, requires_grad=True)


def scalar(rows, keys):
    return torch.randn((), requires_grad=True)


def whole(rows, keys):
    return torch.tensor(3)


# name: (formulas, makers of the operands)
PROGRAMS = {
    "dense": ({}, []),
    "causal": ({"keep": CAUSAL}, []),
    "window": ({"keep": And(CAUSAL, t - s < 50)}, []),
    "chunk": ({"keep": And(CAUSAL, Eq(floor(s / 70), floor(t / 70)))}, []),
    "document": ({"keep": DOCUMENT}, [documents]),
    "per-head": ({"keep": And(CAUSAL, t - s < 40 * h + 1)}, []),
    "offset-read": ({"keep": s <= t + Load(0)}, [whole]),
    "soft-cap": ({"keep": CAUSAL, "score": 3 * sympy.tanh(x / 3)}, []),
    "alibi": ({"keep": CAUSAL, "score": x + Load(0, h) * (s - t)}, [slopes]),
    "relative-bias": ({"score": x + Load(0, Min(Abs(t - s), 9), h)}, [table]),
    "two-reads": ({"score": x * Load(0, 3, h) + Load(0, Min(s, 9), 1)}, [table]),
    "bias": ({"score": x + Load(0, b, 0, t, s)}, [bias]),
    "learned-scale": ({"score": x * sympy.exp(Load(0)), "keep": CAUSAL}, [scalar]),
    "joined": ({"keep": Where(s < 10, 1, Load(0, b, s - 10)) > 0}, [padding]),
    "padding": ({"keep": PADDING}, [padding]),
    "padding-uniform": ({"keep": PADDING, "empty_rows": "uniform"}, [padding]),
    "padding-nan": ({"keep": PADDING, "empty_rows": "nan"}, [padding]),
    "sink": ({"keep": And(PADDING, t - s < 30), "sink": Load(1, h)}, [padding, slopes]),
}


@pytest.fixture
def _as_on_cuda(monkeypatch):
    """Emit what a GPU gets; PyTorch's eager flex_attention takes that on any device."""
    monkeypatch.setattr(lower_flex, "_has_cpu_template", lambda device: False)


def inputs(name, rows=200, keys=200, dtype=torch.float32, requires_grad=False):
    shapes = [(HEADS, rows, SIZE), (KV_HEADS, keys, SIZE), (KV_HEADS, keys, VALUE_SIZE)]
    made = [random_heads(BATCH, *shape, requires_grad=requires_grad) for shape in shapes]
    operands = [make(rows, keys) for make in PROGRAMS[name][1]]
    if not requires_grad:
        operands = [operand.detach() for operand in operands]
    return in_dtype([*made, *operands], dtype)


def program_of(name):
    return ScoreProgram(scale=0.3, **PROGRAMS[name][0])


def placeholders(tensors, dynamic=False):
    """A module that returns its first input, as Dynamo would have it, and its nodes."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = fx.Graph()
    for number, tensor in enumerate(tensors):
        node = graph.placeholder(f"input_{number}")
        source = torch._dynamo.source.ConstantSource(f"input_{number}")
        dims = range(tensor.dim())
        context = torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext(
            dynamic_sizes=[
                torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC
                if dynamic and tensor.shape[dim] > 100
                else torch.fx.experimental.symbolic_shapes.DimDynamic.STATIC
                for dim in dims
            ]
        )
        node.meta["example_value"] = mode.from_tensor(
            tensor, source=source, symbolic_context=context
        )
    graph.output(next(iter(graph.nodes)))
    gm = fx.GraphModule({}, graph)
    *nodes, end = gm.graph.nodes
    return gm, nodes, end


def emitted(program, tensors, dynamic=False, sizes=None):
    """A module that computes `program`."""
    gm, (q, k, v, *operands), end = placeholders(tensors, dynamic)
    result = emit_flex(gm, end, q, k, v, operands, program, sizes or {}, may_be_empty=True)
    end.args = (result,)
    gm.graph.lint()
    gm.recompile()
    return gm


class _Catch(fx.Interpreter):
    """Runs a graph up to flex_attention and keeps its arguments."""

    def call_function(self, target, args, kwargs):
        if target is FLEX:
            self.found = args
            raise StopIteration
        return super().call_function(target, args, kwargs)


def block_mask_of(gm, tensors):
    catch = _Catch(gm)
    with pytest.raises(StopIteration):
        catch.run(*tensors)
    return catch.found[4]


def pairs(count, index):
    """The (sequence, head, row, column) of all blocks on a list."""
    listed = torch.arange(index.shape[-1]) < count[..., None]
    return {
        (*place[:3], int(index[tuple(place)])) for place in map(tuple, listed.nonzero().tolist())
    }


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("name", PROGRAMS)
def test_forward_and_gradients(name):
    program, tensors = program_of(name), inputs(name, requires_grad=True)
    upstream = torch.randn(BATCH, HEADS, 200, VALUE_SIZE)

    def results(function, given):
        out = function(given)
        leaves = [one for one in given if one.requires_grad]
        if program.empty_rows == "nan":  # which gradient NaN has is nobody's promise
            return [out]
        return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    def reference(given):
        return program_attention_ref(*given[:3], given[3:], program)

    truth = results(reference, in_dtype(tensors, torch.float64))
    gm = emitted(program, tensors)
    found = results(lambda given: gm(*given), tensors)
    for one, true in zip(found, truth, strict=True):
        # float32 sums of 40 000 scores, by PyTorch's formulas: 1e-7 * sqrt(40 000) of the largest;
        # a formula of ours that is wrong for one element moves more than that
        scale = true.nan_to_num().abs().max().item()
        torch.testing.assert_close(one.double(), true, rtol=0, atol=3e-5 * scale, equal_nan=True)


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("name", ["dense", "window", "document", "per-head", "bias", "sink"])
def test_one_graph_serves_all_lengths(name):
    program = program_of(name)
    gm = emitted(program, inputs(name), dynamic=True)
    for length in (200, 129, 384, 500):
        tensors = inputs(name, length, length)
        truth = program_attention_ref(*in_dtype(tensors, torch.float64)[:3], tensors[3:], program)
        torch.testing.assert_close(gm(*tensors).double(), truth, rtol=1e-5, atol=1e-5)
        *_, mask_mod = block_mask_of(gm, tensors)
        assert isinstance(mask_mod, fx.GraphModule)


@pytest.mark.parametrize("rows", [256, 200])
@pytest.mark.parametrize(
    "name", ["causal", "window", "chunk", "document", "per-head", "offset-read", "padding"]
)
def test_block_mask_is_the_one_of_create_block_mask(name, rows):
    program, tensors = program_of(name), inputs(name, rows, 300)
    found, captured = block_mask_of(emitted(program, tensors), tensors), tensors[3:]
    wanted = create_block_mask(
        lambda b, h, q_idx, kv_idx: found[-1](b, h, q_idx, kv_idx, *captured),
        BATCH if program.keep.has(b) else 1,
        HEADS if program.keep.has(h) else 1,
        rows,
        300,
        device="cpu",
    )
    true = wanted.as_tuple()
    assert found[:2] == true[:2] == (rows, 300)
    assert len(found) == len(true)
    for mine, theirs in zip(found, true, strict=True):
        assert type(mine) is type(theirs) or callable(mine)
        if isinstance(mine, torch.Tensor):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            assert mine.is_contiguous()
    for axis in ("kv", "q"):
        lists = {}
        for which, layout in (("mine", found), ("theirs", true)):
            for kind in ("", "full_"):
                place = [
                    next(i for i, item in enumerate(true) if item is getattr(wanted, attribute))
                    for attribute in (f"{kind}{axis}_num_blocks", f"{kind}{axis}_indices")
                ]
                lists[which, kind] = pairs(*(layout[i] for i in place))
        assert lists["mine", ""] == lists["theirs", ""], axis
        assert lists["mine", "full_"] == lists["theirs", "full_"], axis


def test_no_mask_gives_the_empty_block_mask():
    tensors = inputs("dense")
    found = block_mask_of(emitted(program_of("dense"), tensors), tensors)
    empty = torch.nn.attention.flex_attention._create_empty_block_mask(*tensors[:2]).as_tuple()
    for mine, theirs in zip(found[:-1], empty[:-1], strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_blocks_that_only_may_be_read_are_partial():
    """A predicate whose bounds are loose costs time, never correctness."""
    scattered = torch.randint(0, 3, (BATCH, 300))
    program = ScoreProgram(keep=Eq(Load(0, b, t), Load(0, b, s)))
    tensors = [*inputs("dense", 300, 300), scattered]
    gm = emitted(program, tensors)
    found = block_mask_of(gm, tensors)
    assert found[2].eq(3).all()
    assert found[4].eq(0).all()
    truth = program_attention_ref(*in_dtype(tensors[:3], torch.float64), [scattered], program)
    torch.testing.assert_close(gm(*tensors).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_as_on_cuda")
def test_sizes_may_be_numbers_or_nodes():
    size = sympy.Symbol("s0", integer=True, positive=True)
    program = ScoreProgram(scale=0.3, keep=s <= t + size, score=x * size, sink=Load(0, h) * size)
    tensors = [*inputs("dense"), torch.rand(HEADS)]
    fixed = program_attention_ref(
        *tensors[:3],
        tensors[3:],
        ScoreProgram(scale=0.3, keep=s <= t + 7, score=7 * x, sink=7 * Load(0, h)),
    )
    torch.testing.assert_close(emitted(program, tensors, sizes={size: 7})(*tensors), fixed)

    tensors = [*tensors, torch.zeros(7)]
    gm, (q, k, v, operand, seven), end = placeholders(tensors)
    with gm.graph.inserting_before(end):
        node = gm.graph.call_method("size", (seven, 0))
    node.meta["example_value"] = 7
    out = emit_flex(gm, end, q, k, v, [operand], program, {size: node}, may_be_empty=True)
    end.args = (out,)
    gm.recompile()
    torch.testing.assert_close(gm(*tensors), fixed)


def test_sites_with_the_same_mask_share_its_blocks():
    tensors = inputs("window")
    gm, (q, k, v), end = placeholders(tensors)
    shared, outputs, masks = {}, [], []
    for name in ("window", "soft-cap", "window", "soft-cap"):
        options = {"may_be_empty": False, "shared": shared}
        outputs.append(emit_flex(gm, end, q, k, v, [], program_of(name), {}, **options))
        masks.append(outputs[-1].args[0].args[4][:-1])
    assert masks[0] == masks[2] != masks[1] == masks[3]
    assert len(shared) == 2
    end.args = (tuple(outputs),)
    gm.graph.lint()
    gm.recompile()
    first, capped, again, _ = gm(*tensors)
    assert torch.equal(first, again)
    assert not torch.allclose(first, capped)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.usefixtures("_as_on_cuda")
def test_every_node_has_an_example_value(dynamic):
    for name in ("document", "relative-bias", "sink"):
        gm = emitted(program_of(name), inputs(name), dynamic)
        for node in gm.graph.nodes:
            if node.op not in ("output", "get_attr"):
                assert "example_value" in node.meta, (name, node)
        result = gm.graph.output_node().args[0].meta["example_value"]
        assert [str(n) for n in result.shape[:2]] == [str(BATCH), str(HEADS)]
        assert result.dtype == torch.float32


def test_nothing_of_the_size_of_the_scores_is_made():
    rows = 1024
    for name in ("window", "document", "chunk"):
        gm = emitted(program_of(name), inputs(name, rows, rows))
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                assert value.numel() < rows * rows / 4, (name, node)


def test_what_cannot_be_written_is_refused():
    tensors = inputs("window")
    with pytest.raises(NotImplementedError, match="factor after the softmax"):
        emitted(ScoreProgram(weight=s + 1), tensors)
    with pytest.raises(NotImplementedError, match="no log-sum-exp on the CPU"):
        emitted(ScoreProgram(sink=sympy.Integer(1)), tensors)
    with pytest.raises(NotImplementedError, match="symbolic sizes"):
        emitted(program_of("document"), inputs("document"), dynamic=True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cuda", True, 128, 128, torch.bfloat16), None),
        (("cuda", False, 192, 128, torch.float16), None),
        (("cuda", False, 8, 128, torch.float16), "16 or more, not 8"),
        (("cuda", False, 128, 512, torch.float16), "head size 512"),
        (("cuda", False, 128, 128, torch.float64), "float64"),
        (("cpu", True, 64, 64, torch.float32), "no backward"),
        (("cpu", False, 64, 64, torch.float32), "elementwise"),
        (("mps", False, 64, 64, torch.float32), "mps"),
    ],
)
def test_supported(arguments, reason):
    found = flex_supported(*arguments)
    assert found is None if reason is None else reason in found


def test_block_mask_takes_what_is_handed_to_it():
    """The layout is asked of `BlockMask`, so its constructor must go on taking these words."""
    assert {"seq_lengths", "kv_num_blocks", "full_q_indices", "BLOCK_SIZE", "mask_mod"} <= set(
        BlockMask.__init__.__annotations__
    )


def compiled(name, backend, **options):
    """A function compiled through `emit_flex`, and its inputs."""
    program = program_of(name)

    def rewrite(gm, example_inputs):
        (node,) = [node for node in gm.graph.nodes if node.target is _site]
        q, k, v, *operands = node.args
        out = emit_flex(gm, node, q, k, v, operands, program, {}, may_be_empty=True)
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
        gm.recompile()
        return backend(gm, example_inputs)

    return torch.compile(lambda *tensors: _site(*tensors), backend=rewrite, **options)


@torch._dynamo.allow_in_graph
def _site(q, k, v, *operands):
    return q.new_empty(*q.shape[:3], v.shape[3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relative-bias", "document"])
def test_inductor_compiles_it(name):
    tensors = inputs(name, 150, 150, dtype=torch.bfloat16)
    with torch.no_grad():
        found = compiled(name, compile_fx)(*tensors)
    truth = program_attention_ref(
        *in_dtype(tensors[:3], torch.float64), tensors[3:], program_of(name)
    )
    # the kernel rounds the weights to bfloat16 (step 2^-8) before it multiplies values below 4
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=4 * 2**-8)


@pytest.mark.slow
def test_inductor_compiles_all_lengths_at_once():
    compilations = []

    def counting(gm, example_inputs):
        compilations.append(gm)
        return compile_fx(gm, example_inputs)

    function = compiled("window", counting, dynamic=True)
    for rows in (150, 256, 300):
        tensors = inputs("window", rows, rows)
        with torch.no_grad():
            found = function(*tensors)
        truth = program_attention_ref(*in_dtype(tensors, torch.float64), [], program_of("window"))
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    assert len(compilations) == 1


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("name", ["soft-cap", "padding-uniform"])
def test_ahead_of_time_autograd_differentiates_it(name):
    tensors = inputs(name, requires_grad=True)
    leaves = [one for one in tensors if one.requires_grad]
    function = compiled(name, torch._dynamo.lookup_backend("aot_eager"))
    found = torch.autograd.grad(function(*tensors).sin().sum(), leaves)
    out = program_attention_ref(*tensors[:3], tensors[3:], program_of(name))
    wanted = torch.autograd.grad(out.sin().sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 5), (1, 4, 6, 2)])
def test_block_lists_are_contiguous_and_list_every_block(shape: tuple[int, ...]) -> None:
    from sparse_compile.kernels.block_lists import block_lists_ref

    partial = torch.rand(shape) < 0.4
    full = (torch.rand(shape) < 0.4) & ~partial
    torch.library.opcheck(torch.ops.sparse_compile.block_lists_v1.default, (partial, full))
    lists = block_lists_ref(partial, full)
    dense = (partial, full, partial.transpose(-2, -1), full.transpose(-2, -1))
    for mask, count, index in zip(dense, lists[::2], lists[1::2], strict=True):
        assert count.is_contiguous()
        assert index.is_contiguous()
        listed = torch.zeros_like(mask)
        place = torch.arange(mask.shape[-1]) < count[..., None]
        listed.scatter_(-1, index.long(), place)
        assert torch.equal(listed, mask)
