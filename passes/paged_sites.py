"""Sites whose keys and values come out of pages: proven to be attention of a sequence's last tokens.

Before:  k, v = paged_gather(pool, table, lens, S, sketch);  softmax(q @ k.mT + mask(t, s)) @ v
After:   the same mask and scores at `t`, now the query's position in its sequence, lens - T + t
Skips:   masks that are not proven to leave out what lies behind the end of a sequence; whatever
         else `paged_attention` has no place for. The gather stays, and the site says why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import sympy
import torch

from sparse_compile import expressions as ex
from sparse_compile.expressions import Load
from sparse_compile.kernels.checks import DTYPES, MAX_HEAD_DIM
from sparse_compile.passes import prove_mask
from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.axes import resolve_layout, size_of
from sparse_compile.passes.candidates import Declined
from sparse_compile.passes.elements import Unproven
from sparse_compile.passes.mutation import mutated_arguments
from sparse_compile.passes.predicates import halfspace
from sparse_compile.passes.shapes import expression, shape_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import fx

    from sparse_compile.ir import Reason, ScoreProgram
    from sparse_compile.passes.elements import ElementEvaluator
    from sparse_compile.passes.programs import OperandRef, Proven
    from sparse_compile.passes.roles import Source

GATHER = "sparse_compile::paged_gather"


@dataclass(frozen=True)
class Paged:
    """The pages behind a site's keys and values, and its program in positions of the sequence."""

    pool: fx.Node
    block_table: fx.Node
    seq_lens: fx.Node
    n_keys: sympy.Expr  # positions that the model reads of every sequence, 0 behind its end
    program: ScoreProgram  # `t` is a position; without what `causal` and `window` say
    operands: tuple[OperandRef, ...]
    causal: bool
    window: int  # how many keys a query reads at most, its own the last; 0 for all
    may_be_empty: bool
    sketch: tuple[fx.Node, fx.Node] | None = None  # codes and scales, where the model gives them

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The tensors that the pages are read from."""
        return self.pool, self.block_table, self.seq_lens

    @property
    def sketched(self) -> tuple[fx.Node, ...]:
        """The same where what is read depends on the sketch, in the operator's order."""
        assert self.sketch is not None
        return self.pool, *self.sketch, self.block_table, self.seq_lens


def gather_of(node: fx.Node, number: int) -> fx.Node | None:
    """The gather that a node is a result of: its keys (0) or its values (1)."""
    if getattr(node.target, "__name__", "") != "getitem" or node.args[1] != number:
        return None
    source: Any = node.args[0]
    is_op = isinstance(source.target, torch._ops.OpOverload)
    return source if is_op and source.target.name() == GATHER else None


def with_pages(
    proven: Proven, evaluator: ElementEvaluator, differentiable: Collection[fx.Node]
) -> Proven:
    """The site with what is proven of its pages, or why that is not enough; as it is without pages."""
    gather = _behind(proven.k, 0)
    if gather is None:
        return proven
    try:
        found: Paged | Reason = _prove(proven, gather[0], evaluator, differentiable)
    except Declined as declined:
        found = declined.reason
    return replace(proven, paged=found)


def _behind(source: Source, number: int) -> tuple[fx.Node, Any] | None:
    """The gather that a tensor is a view of, and the layout of the gather's result."""
    for node, layout in voc.peel(source.tensor.node, source.tensor.layout):
        gather = gather_of(node, number)
        if gather is not None:
            return gather, resolve_layout(layout)
    return None


def _prove(
    proven: Proven,
    gather: fx.Node,
    evaluator: ElementEvaluator,
    differentiable: Collection[fx.Node],
) -> Paged:
    pool, block_table, seq_lens = (_node(arg) for arg in gather.args[:3])
    _check_kind(proven, gather, pool, differentiable)
    n_queries = size_of(proven.roles.queries)
    length, operands = _length(proven, seq_lens, evaluator)
    program = _in_positions(proven.program, length, n_queries)
    # pages may hold more than the model reads of them
    n_keys, room = size_of(proven.roles.keys), shape_of(block_table)[1] * shape_of(pool)[3]
    if not bool(sympy.Ge(n_keys - room, 0) == sympy.true):
        program = msgspec.structs.replace(program, keep=program.keep & sympy.Lt(ex.s, n_keys))
    bounded = _bounds(program.keep, length, proven)
    return Paged(
        pool=pool,
        block_table=block_table,
        seq_lens=seq_lens,
        n_keys=n_keys,
        program=msgspec.structs.replace(program, keep=bounded.rest, empty_rows="zero"),
        operands=operands,
        causal=bounded.causal,
        window=bounded.window,
        may_be_empty=proven.may_be_empty and bounded.rest is not sympy.true,
        sketch=_sketch(gather),
    )


def _sketch(gather: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    codes, scales = (*gather.args[4:6], None, None)[:2]
    codes, scales = gather.kwargs.get("codes", codes), gather.kwargs.get("scales", scales)
    return None if codes is None or scales is None else (_node(codes), _node(scales))


def _node(argument: Any) -> fx.Node:
    if not isinstance(argument.meta.get("val"), torch.Tensor):
        raise Declined("paged-lengths", f"{argument.name} is no tensor")
    return argument


def _check_kind(
    proven: Proven, gather: fx.Node, pool: fx.Node, differentiable: Collection[fx.Node]
) -> None:
    """Refuse what the kernel has no place for."""
    # `paged_attention` takes them up; a site knows of them only here, where it is planned
    from sparse_compile.passes.lowering import compute_dtype

    roles, value = proven.roles, pool.meta["val"]
    values = _behind(proven.v, 1)
    if values is None or values[0] is not gather:
        raise Declined("paged-values", "keys are in pages, and values are not those of the same")
    _, key_layout = _behind(proven.k, 0)  # type: ignore[misc]
    rows = (roles.batch, roles.kv_heads, roles.keys)
    if key_layout != (*rows, roles.head) or values[1] != (*rows, roles.value):
        raise Declined("paged-layout", "what is gathered is rearranged before it is attended to")
    if proven.candidate.out.node in differentiable:
        raise Declined("paged-training", "attention to pages has no gradient")
    if proven.candidate.dropout_p or proven.program.weight is not None or proven.v_factors:
        raise Declined("paged-weights", "attention weights are changed after the softmax")
    if compute_dtype(proven) != value.dtype:
        raise Declined("paged-dtype", f"queries are not {value.dtype}, as the pages are")
    on_cpu = value.device.type == "cpu"
    head = expression(value.shape[4])
    if not head.is_Integer or head > MAX_HEAD_DIM:
        raise Declined("paged-head-dim", f"heads have {head} channels; {MAX_HEAD_DIM} is the most")
    if value.dtype not in DTYPES and not (on_cpu and value.dtype == torch.float64):
        raise Declined("paged-dtype", f"attention to pages has no kernel for {value.dtype}")


def _numbered(
    value: sympy.Basic, evaluator: ElementEvaluator, operands: tuple[OperandRef, ...]
) -> tuple[sympy.Expr, tuple[OperandRef, ...]]:
    """A formula of the evaluator with the site's numbers of operands, and these with its own."""
    from sparse_compile.passes.programs import OperandRef  # it imports this module's types

    changes: dict[sympy.Basic, sympy.Basic] = {}
    for load in value.atoms(Load):
        if any(part.has(Load) for part in load.args[1:]):
            raise Declined("paged-lengths", "the lengths are looked up by what is looked up")
        ref = OperandRef(evaluator.operands[int(load.args[0])])
        if ref not in operands:
            operands = (*operands, ref)
        changes[load] = Load(operands.index(ref), *load.args[1:])
    return value.xreplace(changes), operands


def _length(
    proven: Proven, seq_lens: fx.Node, evaluator: ElementEvaluator
) -> tuple[sympy.Expr, tuple[OperandRef, ...]]:
    """A sequence's length as a formula, by what the site's own formulas load where that is known."""
    end = _counted(seq_lens)
    for number, ref in enumerate(proven.operands):
        if end is None or not isinstance(ref.node, torch.fx.Node) or ref.layout is not None:
            continue
        value = ref.node.meta["val"]
        begin = _counted(ref.node)
        is_number = isinstance(value, torch.Tensor) and value.dim() == 0
        if is_number and begin is not None and begin[0] is end[0]:
            return Load(number) + end[1] - begin[1], proven.operands
    try:
        length = evaluator.element(seq_lens, (ex.b,), proven.roles.sizes())
    except Unproven as error:
        raise Declined("paged-lengths", f"the lengths are not understood: {error}") from None
    return _numbered(length, evaluator, proven.operands)


def _counted(node: fx.Node) -> tuple[fx.Node, int] | None:
    """A whole number as a tensor of no dimensions that the caller gave, and what was added to it.

    None where a tensor is read after something else was written into it: an alias has the new value.
    """
    added, order = 0, {each: place for place, each in enumerate(node.graph.nodes)}
    while (
        isinstance(node.target, torch._ops.OpOverload) and not node.meta["val"].is_floating_point()
    ):
        name = node.target._schema.name.split("::")[1].rstrip("_")
        before: Any = node.args[1] if name == "copy" else node.args[0]
        if name == "add":
            if not isinstance(node.args[1], int) or node.kwargs:
                return None
            added += node.args[1]
        elif name not in ("copy", "to", "_to_copy"):
            return None
        readers = [node] if mutated_arguments(node) else [node, *node.users]
        written = [user for user in before.users if before in mutated_arguments(user)]
        first = min((order[user] for user in written), default=len(order))
        if any(order[user] > first for user in readers):
            return None
        node = before
    is_given = node.op == "placeholder" and node.meta["val"].dim() == 0
    return (node, added) if is_given else None


def _in_positions(program: ScoreProgram, length: sympy.Expr, n_queries: sympy.Expr) -> ScoreProgram:
    """A program of query numbers as one of positions, where query `t` is at `length - T + t`."""
    changes: dict[sympy.Basic, sympy.Basic] = {ex.t: ex.t - length + n_queries}
    loads = length.atoms(Load)
    if n_queries == 1 and len(loads) == 1:
        # the one query is the last token: what is known of its position tells the length
        (load,) = loads
        rest = sympy.expand(length - load)
        changes = {ex.t: sympy.Integer(0)}
        if not rest.has(Load):
            changes[load] = ex.t + 1 - rest
    parts = {name: getattr(program, name) for name in ("score", "keep", "sink")}
    return msgspec.structs.replace(
        program, **{name: _changed(part, changes) for name, part in parts.items()}
    )


def _changed(
    part: sympy.Basic | None, changes: dict[sympy.Basic, sympy.Basic]
) -> sympy.Basic | None:
    """A formula with parts changed at once, and what cancels out left out."""
    if part is None or not any(part.has(old) for old in changes):
        return part
    return part.xreplace(changes).replace(
        lambda node: isinstance(node, sympy.Add) and node.has(Load), sympy.expand
    )


@dataclass(frozen=True)
class _Bounds:
    causal: bool
    window: int
    rest: sympy.Basic


def _bounds(keep: sympy.Basic, length: sympy.Expr, proven: Proven) -> _Bounds:
    """Take out of a predicate over positions what the kernel does by itself.

    Raises:
        Declined: It may keep keys behind the end of the sequence, which are 0 in the model.
    """
    ranges = {symbol: n for symbol, n in proven.roles.sizes().items() if symbol != ex.t}
    causal = ends = False
    window, rest = 0, []
    for part in sympy.And.make_args(prove_mask.normalise(keep, ranges)):
        space = halfspace(part)
        after = _after_end(part, length)
        if space is not None and space.form == ex.s - ex.t and space.bound <= 0:
            causal = True
            rest += [part] if space.bound != 0 else []
        elif space is not None and space.form == ex.t - ex.s and _is_window(space.bound):
            window = int(space.bound) + 1
        elif after is not None and after <= 0:
            ends = True
            rest += [part] if after != 0 else []
        elif part is not sympy.true:
            rest.append(part)
    if not causal and not ends:
        message = "the mask is not proven to leave out what lies behind the end of a sequence"
        raise Declined("paged-mask", message)
    return _Bounds(causal, window, sympy.And(*rest))


def _is_window(bound: sympy.Expr) -> bool:
    return bool(bound.is_Integer and 0 <= bound < 2**31 - 1)


def _after_end(part: sympy.Basic, length: sympy.Expr) -> sympy.Expr | None:
    """For a part that keeps keys up to `length - 1 + c`, that c; None for any other."""
    if isinstance(part, (sympy.Ge, sympy.Gt)):
        part = part.reversed
    if not isinstance(part, (sympy.Le, sympy.Lt)):
        return None
    strict = int(isinstance(part, sympy.Lt))
    beyond = sympy.expand(ex.s - length + 1 - (part.lhs - part.rhs + strict))
    return beyond if beyond.is_Integer else None
