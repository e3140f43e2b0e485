"""Write the replacement of one site into the Dynamo graph."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import sympy
import torch
from torch import fx

from sparse_compile import expressions as ex
from sparse_compile.evaluation import Source as OperandSource
from sparse_compile.evaluation import evaluate
from sparse_compile.expressions import Load
from sparse_compile.passes.axes import Axis, resolve, size_of
from sparse_compile.passes.candidates import Declined
from sparse_compile.passes.distance_tables import Table, emit_table
from sparse_compile.passes.lower_flex import emit_flex
from sparse_compile.passes.lower_paged import PAGED_KERNELS, emit_paged, emit_progressive
from sparse_compile.passes.paged_sites import Paged
from sparse_compile.passes.programs import Factor, OperandRef, Proven, Source

if TYPE_CHECKING:
    from sparse_compile.ir import KernelPlan, ScoreProgram
    from sparse_compile.passes.emit import Emitter

PROGRAM_OP = torch.ops.sparse_compile
TILE, BLOCK_SIZE = 128, 128  # of lists of KV blocks
LOOKED_AT = 2**22  # pairs of a tile and a KV block, to find the longest list


def lower(emitter: Emitter, proven: Proven, plan: KernelPlan) -> fx.Node:
    """Emit a site's replacement.

    Returns:
        The Dynamo node that has the value of the site's output, in its layout and dtype.
    Raises:
        Declined: a tensor cannot be brought to the kernel's layout.
    """
    roles, candidate = proven.roles, proven.candidate
    dtype = compute_dtype(proven)
    queries = (roles.batch, roles.query_heads, roles.queries, roles.head)
    keys = (roles.batch, roles.kv_heads, roles.keys, roles.head)
    values = (roles.batch, roles.kv_heads, roles.keys, roles.value)
    q = _operand(emitter, proven.q, queries, dtype)
    for factor in proven.q_factors:
        q = _scaled(emitter, q, factor, (roles.batch, roles.query_heads, roles.queries, ()))
    if plan.kernel in PAGED_KERNELS:
        out = _paged_attention(emitter, proven, plan, q)
    else:
        k = _operand(emitter, proven.k, keys, dtype)
        v = _operand(emitter, proven.v, values, dtype)
        for factor in proven.v_factors:
            v = _scaled(emitter, v, factor, (roles.batch, roles.kv_heads, roles.keys, ()))
        out = _KERNELS[plan.kernel](emitter, proven, plan, q, k, v)
        if proven.absorbed:
            out = _with_absorbed_gradient(emitter, proven, q, k, v, out)
    for factor in proven.out_factors:
        out = _scaled(emitter, out, factor, (roles.batch, roles.query_heads, roles.queries, ()))
    wanted = candidate.out.node.meta["val"].dtype
    out = _cast(emitter, out, wanted)
    order = (roles.batch, roles.query_heads, roles.queries, roles.value)
    return emitter.restore(out, order, candidate.out.layout)


def compute_dtype(proven: Proven) -> torch.dtype:
    """The dtype in which Q, K and V meet; autocast shows in the dtype of the model's own products."""
    dtypes = {proven.q.dtype, proven.k.dtype, proven.v.dtype}
    out = proven.candidate.out.node.meta["val"].dtype
    if len(dtypes) == 1:
        (dtype,) = dtypes
        own = proven.candidate.v.node.meta["val"].dtype
        return out if own != out and own == dtype else dtype
    wide = torch.promote_types(proven.q.dtype, proven.k.dtype)
    return torch.promote_types(wide, proven.v.dtype)


def _operand(
    emitter: Emitter, source: Source, order: tuple[tuple[Axis, ...], ...], dtype: torch.dtype
) -> fx.Node:
    node = emitter.value(source.tensor.node)
    node = emitter.arrange(node, source.tensor.layout, order, whole=[True] * len(order))
    return _cast(emitter, node, dtype)


def _cast(emitter: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor) and value.dtype == dtype:
        return node
    return emitter.method("to", node, dtype)


def _scaled(
    emitter: Emitter, node: fx.Node, factor: Factor, order: tuple[tuple[Axis, ...], ...]
) -> fx.Node:
    """Multiply by a factor, or put zeros where it says so; keeps the dtype."""
    dtype = node.meta["example_value"].dtype
    if factor.term is None:
        assert factor.value is not None
        value: Any = float(factor.value)
    elif isinstance(factor.term.meta.get("val"), torch.Tensor):
        value = emitter.arrange(emitter.value(factor.term), factor.layout, order)
    else:
        value = emitter.value(factor.term)
    if factor.zero_if is not None:
        mask = value if factor.zero_if else emitter.call(torch.logical_not, value)
        return emitter.method("masked_fill", node, mask, 0.0)
    function = torch.div if factor.inverse else torch.mul
    return _cast(emitter, emitter.call(function, node, value), dtype)


def operand_node(
    emitter: Emitter, proven: Proven, ref: OperandRef, device: torch.device
) -> fx.Node:
    """The Dynamo node of an operand; sizes become numbers of no dimensions on `device`."""
    if isinstance(ref.node, Table):
        return emit_table(emitter, ref.node, proven.roles.sizes(), device)
    if not isinstance(ref.node, fx.Node):
        return emitter.size_tensor(ref.node, device)
    node = emitter.value(ref.node)
    if not isinstance(node.meta["example_value"], torch.Tensor):
        return emitter.call(torch.full, (), node, dtype=torch.float64, device=device)
    if ref.layout is None:
        return node
    roles = proven.roles
    order = [roles.batch, roles.query_heads, roles.queries, roles.keys]
    if not ref.cuts:
        return emitter.arrange(node, ref.layout, order)
    whole, padding = [False] * 4, [0] * 8
    for cut in ref.cuts:
        position = next((i for i in (2, 3) if order[i] == resolve(cut.whole)), None)
        if position is None:
            raise Declined("layout", "a part of the scores is no range of queries or keys")
        order[position], whole[position] = resolve(cut.part), True
        rest = size_of(cut.whole) - size_of(cut.part) - cut.start
        padding[6 - 2 * position : 8 - 2 * position] = (cut.start, emitter.size(rest))
    node = emitter.arrange(node, ref.layout, order, whole=whole)
    return emitter.call(torch.nn.functional.pad, node, tuple(padding))


def used_operands(proven: Proven) -> tuple[ScoreProgram, tuple[OperandRef, ...]]:
    """The program with only the operands that it loads, numbered anew."""
    parts = _parts(proven.program)
    loads = {load for part in parts.values() for load in part.atoms(Load)}
    used = sorted({int(load.args[0]) for load in loads})
    number = {old: new for new, old in enumerate(used)}

    def renumbered(part: sympy.Basic) -> sympy.Basic:
        return part.replace(Load, lambda i, *index: Load(number[int(i)], *index))

    changed = {
        name: part if used == list(range(len(used))) else renumbered(part)
        for name, part in parts.items()
    }
    program = msgspec.structs.replace(proven.program, **changed)
    return program, tuple(proven.operands[old] for old in used)


def closed_program(proven: Proven) -> tuple[ScoreProgram, tuple[OperandRef, ...]]:
    """The same with every size symbol turned into a load of a number of no dimensions."""
    program, refs = used_operands(proven)
    parts = _parts(program)
    changes: dict[sympy.Basic, sympy.Basic] = {}
    for symbol in size_symbols(program):
        changes[symbol] = Load(len(refs))
        refs = (*refs, OperandRef(symbol))
    closed = {name: part.xreplace(changes) for name, part in parts.items()}
    return msgspec.structs.replace(program, **closed), refs


def size_symbols(program: ScoreProgram) -> list[sympy.Symbol]:
    """The size symbols of a program, in a fixed order."""
    found = {symbol for part in _parts(program).values() for symbol in part.free_symbols}
    return sorted(found - {*ex.INDICES, ex.x}, key=str)


def _parts(program: ScoreProgram) -> dict[str, sympy.Basic]:
    names = ("score", "keep", "sink", "weight")
    return {name: part for name in names if (part := getattr(program, name)) is not None}


def _program_attention(
    emitter: Emitter, proven: Proven, plan: KernelPlan, q: fx.Node, k: fx.Node, v: fx.Node
) -> fx.Node:
    import sparse_compile.kernels.program_attention  # noqa: F401  registers the operator

    program, refs = closed_program(proven)
    device = q.meta["example_value"].device
    operands = [operand_node(emitter, proven, ref, device) for ref in refs]
    p = proven.candidate.dropout_p
    seed = emitter.call(torch.randint, 2**62, (), dtype=torch.int64, device=device) if p else None
    both = emitter.call(
        PROGRAM_OP.program_attention_v1.default, q, k, v, operands, program.encode(), p, seed
    )
    return emitter.call(operator.getitem, both, 0)


def _paged_attention(emitter: Emitter, proven: Proven, plan: KernelPlan, q: fx.Node) -> fx.Node:
    paged = proven.paged
    assert isinstance(paged, Paged)
    own = replace(proven, program=paged.program, operands=paged.operands)
    program, refs = closed_program(own)
    device = q.meta["example_value"].device
    operands = [operand_node(emitter, proven, ref, device) for ref in refs]
    if plan.kernel == "progressive_attention":
        return emit_progressive(
            emitter, paged, q, program, operands, proven.program.empty_rows, plan.flags
        )
    return emit_paged(emitter, paged, q, program, operands, proven.program.empty_rows)


def _selected_attention(
    emitter: Emitter, proven: Proven, plan: KernelPlan, q: fx.Node, k: fx.Node, v: fx.Node
) -> fx.Node:
    # these register the operators
    import sparse_compile.kernels.selected_attention
    import sparse_compile.kernels.top_k_selection  # noqa: F401

    scale, flags = proven.program.scale, plan.flags
    # the choice of KV blocks has no gradient
    chosen = emitter.call(
        PROGRAM_OP.top_k_selection.default, emitter.method("detach", q),
        emitter.method("detach", k), flags["k"], flags["block_size"], flags["sinks"],
        flags["local"], scale, flags["scores"],
    )  # fmt: skip
    both = emitter.call(
        PROGRAM_OP.selected_attention.default, q, k, v, chosen, flags["block_size"], scale, True,
        None, plan.loop_order or None,
    )  # fmt: skip
    return emitter.call(operator.getitem, both, 0)


def _block_sparse_attention(
    emitter: Emitter, proven: Proven, plan: KernelPlan, q: fx.Node, k: fx.Node, v: fx.Node
) -> fx.Node:
    import sparse_compile.kernels.block_sparse  # noqa: F401  registers the operators

    program, refs = closed_program(proven)
    if not proven.may_be_empty:
        program = msgspec.structs.replace(program, empty_rows="zero")
    device = q.meta["example_value"].device
    operands = [operand_node(emitter, proven, ref, device) for ref in refs]
    lists = _block_lists(emitter, program, operands, q, k)
    both = emitter.call(
        PROGRAM_OP.block_sparse_attention_v1.default, q, k, v, *lists, operands, program.encode(),
        TILE, BLOCK_SIZE,
    )  # fmt: skip
    return emitter.call(operator.getitem, both, 0)


def _block_lists(
    emitter: Emitter, program: ScoreProgram, operands: list[fx.Node], q: fx.Node, k: fx.Node
) -> list[fx.Node]:
    """Lists of the KV blocks that the mask keeps; sites with the same mask and sizes share them."""
    used = sorted({int(load.args[0]) for load in program.keep.atoms(Load)})
    number = {old: new for new, old in enumerate(used)}
    keep = program.keep.replace(Load, lambda i, *index: Load(number[int(i)], *index))
    text = type(program)(keep=keep).encode()
    read = [operands[i] for i in used]
    shapes = [tuple(node.meta["example_value"].shape[:3]) for node in (q, k)]
    key = ("block lists", text, tuple(read), str(shapes))
    if key not in emitter.shared:
        arguments = [emitter.method("detach", node) for node in (q, k)]
        read = [emitter.method("detach", node) for node in read]
        lists = emitter.call(
            PROGRAM_OP.list_blocks_v1.default, *arguments, read, text, TILE, BLOCK_SIZE,
            None if used else _longest_list(text, shapes),
        )  # fmt: skip
        parts = [emitter.call(operator.getitem, lists, i) for i in range(3)]
        emitter.shared[key] = (lists, *parts)
    return list(emitter.shared[key][1:])


def _longest_list(text: str, shapes: list[tuple[Any, ...]]) -> int | None:
    """How many KV blocks the longest list of a mask that reads nothing has, if sizes are known."""
    sizes = [size for shape in shapes for size in shape]
    if not all(isinstance(size, int) for size in sizes):
        return None
    if shapes[0][1] * shapes[0][2] * shapes[1][2] > LOOKED_AT * TILE * BLOCK_SIZE:
        return None
    q, k = (torch.empty(1).expand(*shape, 1) for shape in shapes)
    _, counts, _ = PROGRAM_OP.list_blocks_v1(q, k, [], text, TILE, BLOCK_SIZE, None)
    return max(1, int(counts.max())) if counts.numel() else None


def _flex_attention(
    emitter: Emitter, proven: Proven, plan: KernelPlan, q: fx.Node, k: fx.Node, v: fx.Node
) -> fx.Node:
    program, refs = used_operands(proven)
    device = q.meta["example_value"].device
    operands = [operand_node(emitter, proven, ref, device) for ref in refs]
    sizes = {symbol: emitter.size(symbol) for symbol in size_symbols(program)}
    with emitter.recording():
        return emit_flex(
            emitter.gm, emitter.before, q, k, v, operands, program, sizes,
            may_be_empty=proven.may_be_empty, shared=emitter.shared,
        )  # fmt: skip


def _sdpa(
    emitter: Emitter, proven: Proven, plan: KernelPlan, q: fx.Node, k: fx.Node, v: fx.Node
) -> fx.Node:
    roles, program = proven.roles, proven.program
    mask = has_key = None
    if plan.flags.get("mask"):
        mask, has_key = _mask_tensor(emitter, proven, q)
    gqa = bool(plan.flags.get("enable_gqa"))
    if roles.group and not gqa:
        k = _repeat_heads(emitter, proven, k, roles.head)
        v = _repeat_heads(emitter, proven, v, roles.value)
    options: dict[str, Any] = {"scale": program.scale}
    if gqa:
        options["enable_gqa"] = True
    if mask is not None:
        options["attn_mask"] = mask
    if plan.flags.get("is_causal"):
        options["is_causal"] = True
    if proven.candidate.dropout_p:
        options["dropout_p"] = proven.candidate.dropout_p
    out = emitter.call(torch.nn.functional.scaled_dot_product_attention, q, k, v, **options)
    if has_key is None and mask is not None and _overflows(proven):
        has_key = emitter.method("any", emitter.call(torch.isfinite, mask), -1, keepdim=True)
        return emitter.call(torch.where, has_key, out, float("nan"))
    if has_key is None or not proven.may_be_empty or program.empty_rows == "zero":
        return out
    if program.empty_rows == "nan":
        return emitter.call(torch.where, has_key, out, float("nan"))
    mean = emitter.method("mean", v, 2, keepdim=True)
    if roles.group and gqa:
        mean = _repeat_heads(emitter, proven, mean, roles.value, tokens=())
    return emitter.call(torch.where, has_key, out, mean)


def _overflows(proven: Proven) -> bool:
    """Whether a bias that stays a tensor may be minus infinity for a whole row: eager gives NaN."""
    return proven.mask.opaque and not proven.candidate.nan_to_zero


def _repeat_heads(
    emitter: Emitter, proven: Proven, node: fx.Node, last: tuple[Axis, ...],
    tokens: tuple[Axis, ...] | None = None,
) -> fx.Node:  # fmt: skip
    roles = proven.roles
    tokens = roles.keys if tokens is None else tokens
    layout = (roles.batch, roles.kv_heads, tokens, last)
    order = (roles.batch, roles.query_heads, tokens, last)
    return emitter.arrange(node, layout, order, whole=[True] * 4)


class _Formulas:
    """Writes a site's predicate and bias as tensors over [B, H, T, S], broadcastable."""

    def __init__(self, emitter: Emitter, proven: Proven, device: torch.device) -> None:
        self.emitter = emitter
        self.program, refs = closed_program(proven)
        self.bias = self.program.score - ex.x
        self.env: dict[sympy.Basic, fx.Node] = {}
        for axis, (symbol, size) in enumerate(proven.roles.sizes().items()):
            if self.bias.has(symbol) or self.program.keep.has(symbol):
                shape = [-1 if axis == i else 1 for i in range(4)]
                index = emitter.call(torch.arange, emitter.size(size), device=device)
                self.env[symbol] = emitter.method("reshape", index, shape)
        self.operands = [operand_node(emitter, proven, ref, device) for ref in refs]
        for load in {*self.bias.atoms(Load), *self.program.keep.atoms(Load)}:
            if refs[int(load.args[0])].layout is not None:
                self.env[load] = self.operands[int(load.args[0])]

    def value(self, expr: sympy.Basic, dtype: torch.dtype) -> fx.Node:
        """The node of an expression."""

        def function(*proxies: Any) -> Any:
            given = dict(zip(self.env, proxies, strict=False))
            tensors = [
                OperandSource(proxy, node.meta["example_value"].dtype, _plain_shape(node))
                for proxy, node in zip(proxies[len(self.env) :], self.operands, strict=True)
            ]
            return evaluate(expr, given, tensors, dtype=dtype)

        return self.emitter.traced(function, *self.env.values(), *self.operands)

    def row_has_key(self) -> fx.Node:
        """Whether a row keeps a key, [B, H, T, 1]."""
        keep = self.value(self.program.keep, torch.float32)
        return self.emitter.method("any", keep, -1, keepdim=True)


def _mask_tensor(emitter: Emitter, proven: Proven, q: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """A site's mask and bias as one tensor for fused attention, and which rows keep a key."""
    example = q.meta["example_value"]
    formulas = _Formulas(emitter, proven, example.device)
    program, bias = formulas.program, formulas.bias
    if program.keep is sympy.true:
        return _cast(emitter, formulas.value(bias, example.dtype), example.dtype), None
    keep = formulas.value(program.keep, torch.float32)
    has_key = emitter.method("any", keep, -1, keepdim=True) if proven.may_be_empty else None
    if bias == 0:
        return keep, has_key
    value = formulas.value(bias, example.dtype)
    mask = emitter.call(torch.where, keep, value, float("-inf"))
    return _cast(emitter, mask, example.dtype), has_key


def _with_absorbed_gradient(
    emitter: Emitter, proven: Proven, q: fx.Node, k: fx.Node, v: fx.Node, out: fx.Node
) -> fx.Node:
    """Give rows without a key the gradient that they have in the model.

    A large negative number was added to all their scores: the sum has lost the scores, so that all
    weights are 1/S, but its derivative has not. To first order in the scores x the row's output is
    mean(v) + sum_s x_s (v_s - mean(v)) / S; the sum is added with value zero.
    """
    roles = proven.roles
    example = q.meta["example_value"]
    has_key = _Formulas(emitter, proven, example.device).row_has_key()
    mean = emitter.method("mean", v, 2, keepdim=True)
    centred = emitter.method("detach", emitter.call(torch.sub, v, mean))
    moment = emitter.call(torch.matmul, emitter.method("transpose", k, 2, 3), centred)
    if roles.group:
        moment = _repeat_heads(emitter, proven, moment, roles.value, tokens=roles.head)
    size = emitter.size(size_of(roles.keys))
    factor = emitter.call(operator.truediv, proven.program.scale, size)
    first_order = emitter.call(torch.mul, emitter.call(torch.matmul, q, moment), factor)
    zero = emitter.call(torch.sub, first_order, emitter.method("detach", first_order))
    return emitter.call(torch.add, out, emitter.call(torch.where, has_key, 0.0, zero))


def _plain_shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["example_value"].shape)


_KERNELS = {
    "sdpa": _sdpa,
    "block_sparse_attention": _block_sparse_attention,
    "flex_attention": _flex_attention,
    "program_attention": _program_attention,
    "selected_attention": _selected_attention,
}
