"""Prove what an attention computes: its steps become score transforms, a mask and a score program."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from sparse_compile import expressions as ex
from sparse_compile import ir
from sparse_compile.expressions import Load, Where
from sparse_compile.passes import distance_tables, prove_mask
from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.axes import Layout, axes_of, resolve, resolve_layout
from sparse_compile.passes.candidates import DROPPED, Candidate, Cut, Declined, Step
from sparse_compile.passes.distance_tables import Table, find_table
from sparse_compile.passes.elements import ElementEvaluator, Unproven
from sparse_compile.passes.roles import Roles, Source, assign_roles, sources

if TYPE_CHECKING:
    from sparse_compile.passes.paged_sites import Paged

ABSORBED = -1e8  # a finite fill below this swallows any float32 score it is added to


@dataclass(frozen=True)
class OperandRef:
    """A tensor that a program loads: as it is, or brought to [B, H, T, S] when `layout` is given."""

    node: fx.Node | sympy.Expr | Table  # an expression: a size, as a number of no dimensions
    layout: Layout | None = None
    cuts: tuple[Cut, ...] = ()  # it covers only these positions; 0 elsewhere

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The shadow nodes that it is read from."""
        if isinstance(self.node, Table):
            return self.node.nodes
        return (self.node,) if isinstance(self.node, fx.Node) else ()


@dataclass(frozen=True)
class Factor:
    """A tensor or number that scales Q, V or the output, or a Boolean that zeroes it."""

    term: fx.Node | None
    layout: Layout
    value: sympy.Expr | None = None
    inverse: bool = False
    zero_if: bool | None = None  # the truth value of `term` at which the result is zero


@dataclass(frozen=True)
class Proven:
    """A candidate with everything proven that a rewrite needs."""

    candidate: Candidate
    roles: Roles
    q: Source
    k: Source
    v: Source
    program: ir.ScoreProgram
    operands: tuple[OperandRef, ...]
    transforms: tuple[ir.ScoreTransform, ...]
    mask: ir.MaskProof
    may_be_empty: bool
    absorbed: bool = False  # an added fill swallows empty rows' scores; their gradient passes it
    q_factors: tuple[Factor, ...] = ()
    v_factors: tuple[Factor, ...] = ()
    out_factors: tuple[Factor, ...] = ()
    paged: Paged | ir.Reason | None = None  # where K and V are gathered from pages

    @property
    def is_dense_bias(self) -> bool:
        """Some bias or mask stays a tensor over queries and keys."""
        return any(
            prove_mask.is_dense_load(load)
            for part in (self.program.score, self.program.keep)
            for load in part.atoms(Load)
        )


@dataclass
class _Mask:
    keep: sympy.Basic
    fill: sympy.Expr
    absorbing: bool  # overwrites the score rather than being added to it


@dataclass
class _Builder:
    """Collects the steps of one candidate."""

    candidate: Candidate
    roles: Roles
    evaluator: ElementEvaluator
    differentiable: Collection[fx.Node] = frozenset()
    operands: list[OperandRef] = field(default_factory=list)
    known: dict[Any, int] = field(default_factory=dict)
    items: list[tuple[str, Any]] = field(default_factory=list)
    transforms: list[ir.ScoreTransform] = field(default_factory=list)
    q_factors: list[Factor] = field(default_factory=list)
    scale: sympy.Expr = field(default_factory=lambda: sympy.Integer(1))
    sink: sympy.Expr | None = None
    opaque_mask: bool = False

    @property
    def ranges(self) -> dict[sympy.Symbol, sympy.Expr]:
        return self.roles.sizes()

    @property
    def only_scaled(self) -> bool:
        return not self.items

    def operand(
        self,
        node: fx.Node | sympy.Expr | Table,
        layout: Layout | None = None,
        cuts: tuple[Cut, ...] = (),
    ) -> int:
        key = (node, layout, cuts)
        if key not in self.known:
            self.known[key] = len(self.operands)
            self.operands.append(OperandRef(node, layout, cuts))
        return self.known[key]

    def dense(self, term: fx.Node, layout: Layout, cuts: tuple[Cut, ...] = ()) -> sympy.Expr:
        """A load of the tensor itself, brought to [B, H, T, S]."""
        here = set(axes_of(layout)) | {axis for cut in cuts for axis in resolve(cut.whole)}
        r = self.roles
        index = [
            symbol if here & set(axes) else sympy.Integer(0)
            for symbol, axes in zip(
                ex.INDICES, (r.batch, r.query_heads, r.queries, r.keys), strict=True
            )
        ]
        return Load(self.operand(term, resolve_layout(layout), cuts), *index)

    def element(self, term: fx.Node, layout: Layout) -> sympy.Basic | None:
        """The term's element at (b, h, t, s), or None where it cannot be expressed."""
        indexing = self.roles.indexing()
        try:
            dims = [indexing.dim(dim) for dim in resolve_layout(layout)]
            found = self.evaluator.element(term, dims, self.ranges)
        except (Unproven, KeyError):
            return None
        if not prove_mask.is_dense_load(found):
            return self._own(found)
        if ex.is_predicate(found) or term in self.differentiable:
            return None
        device = term.meta["val"].device.type
        return self._by_distance(found) if device in distance_tables.DEVICES else None

    def number(self, term: fx.Node, layout: Layout) -> sympy.Expr | None:
        """The same as a number: 0 or 1 for a Boolean."""
        found = self.element(term, layout)
        return ex.Truth(found) if found is not None and ex.is_predicate(found) else found

    def _by_distance(self, value: sympy.Basic) -> sympy.Basic | None:
        """A bias whose dense part depends on the distance alone reads it from a table."""
        parts = sympy.Add.make_args(value)
        dense = [part for part in parts if prove_mask.is_dense_load(part)]
        table = find_table(sympy.Add(*dense), self.evaluator, self.ranges)
        if table is None:
            return None
        rest = self._own(sympy.Add(*(part for part in parts if part not in dense)))
        return Load(self.operand(table), *table.index) + rest

    def _own(self, found: sympy.Basic) -> sympy.Basic:
        """Renumber the evaluator's operands to this site's; a load's index may hold loads."""
        known: dict[sympy.Basic, sympy.Basic] = {}

        def renumbered(part: sympy.Basic) -> sympy.Basic:
            if not part.has(Load):
                return part
            if part not in known:
                inner = part.args
                if isinstance(part, Load):
                    node = self.evaluator.operands[int(inner[0])]
                    known[part] = Load(self.operand(node), *map(renumbered, inner[1:]))
                else:
                    known[part] = part.func(*map(renumbered, inner))
            return known[part]

        return renumbered(found)

    def add(
        self, term: fx.Node, layout: Layout, factor: sympy.Expr, cuts: tuple[Cut, ...] = ()
    ) -> None:
        value = None if cuts else self.number(term, layout)
        if value is None:
            bias = factor * self.dense(term, layout, cuts)
            self.items.append(("bias", bias))
            self.opaque_mask = self.opaque_mask or _may_mask(term)
            self.transforms.append(ir.Bias(value=bias, text=f"tensor {term.name}"))
            return
        try:
            proof = prove_mask.prove_additive(factor * value, self.ranges)
        except Unproven:
            proof = None
        if proof is None or proof.dense:
            bias = factor * self.dense(term, layout)
            self.items.append(("bias", bias))
            self.opaque_mask = True
            self.transforms.append(ir.Bias(value=bias, text=f"tensor {term.name}"))
            return
        if proof.keep is not sympy.true:
            self._mask(proof.keep, _fill(proof.fill), absorbing=False)
        if proof.bias != 0:
            self.items.append(("bias", proof.bias))
            self.transforms.append(ir.Bias(value=proof.bias, text=_bias_text(proof.bias)))

    def fill(self, step: Step) -> None:
        value = step.value
        assert value is not None
        if step.name == "causal":
            self._mask(sympy.Le(ex.s, ex.t), value, absorbing=True)
            return
        assert step.term is not None
        found = self.element(step.term, step.layout)
        if not _is_binary(step.term, found):
            raise Declined("weights-factor", f"{step.term.name} may hold more than 0 and 1")
        proof = None if found is None else prove_mask.prove_boolean(_boolean(found), self.ranges)
        if proof is None or proof.dense:
            keep: sympy.Basic = sympy.Ne(self.dense(step.term, step.layout), 0)
            self.opaque_mask = True
        else:
            keep = proof.keep
        if not step.keep_if:
            keep = sympy.Not(keep)
        self._mask(keep, value, absorbing=True)

    def _mask(self, keep: sympy.Basic, fill: sympy.Expr, absorbing: bool) -> None:
        keep = prove_mask.normalise(keep, self.ranges)
        if keep is sympy.true:
            return
        if not fill.is_number:
            raise Declined("mask-fill", f"masked scores are filled with {fill}")
        if fill > DROPPED:
            part = Where(keep, ex.x if absorbing else 0, fill)
            self.items.append(("map", part) if absorbing else ("bias", part))
            kind = ir.Elementwise(value=part) if absorbing else ir.Bias(value=part)
            self.transforms.append(kind)
            return
        self.items.append(("mask", _Mask(keep, fill, absorbing)))
        self.transforms.append(ir.Masked(keep=keep, fill=float(fill)))

    def multiply(self, step: Step) -> None:
        inverse = step.kind == "div"
        if step.value is not None and step.term is None:
            factor = 1 / step.value if inverse else step.value
            self._scale_by(factor)
            return
        term = step.term
        assert term is not None
        if self.only_scaled and not set(axes_of(step.layout)) & set(self.roles.keys):
            self.q_factors.append(Factor(term, resolve_layout(step.layout), inverse=inverse))
            self.transforms.append(ir.Scale(factor=sympy.Symbol(term.name)))
            return
        if not voc.is_tensor(term):
            raise Declined("symbolic-scale", f"a symbolic number {term.name} scales biased scores")
        value = self.number(term, step.layout)
        if value is None:
            value = self.dense(term, step.layout)
        value = 1 / value if inverse else value
        self.items.append(("map", ex.x * value))
        self.transforms.append(ir.Elementwise(value=ex.x * value))

    def _scale_by(self, factor: sympy.Expr) -> None:
        if not factor.is_number:
            raise Declined("symbolic-scale", f"the scores are scaled by the size {factor}")
        if self.only_scaled:
            self.scale *= factor
        else:
            self.items.append(("map", ex.x * factor))
        self.transforms.append(ir.Scale(factor=sympy.Float(float(factor))))

    def bound(self, step: Step) -> None:
        limit = step.value
        if step.term is not None:
            found = self.element(step.term, step.layout)
            limit = self.dense(step.term, step.layout) if found is None else found  # type: ignore[assignment]
        if step.kind == "max" and limit.is_number and limit <= DROPPED:  # type: ignore[union-attr]
            self.items.append(("floor", limit))
            return
        part = (sympy.Max if step.kind == "max" else sympy.Min)(ex.x, limit)
        self.items.append(("map", part))
        self.transforms.append(ir.Elementwise(value=part))

    def unary(self, step: Step) -> None:
        functions = {
            "tanh": sympy.tanh, "exp": sympy.exp, "log": sympy.log, "abs": sympy.Abs,
            "sign": sympy.sign, "sqrt": sympy.sqrt, "neg": lambda v: -v,
            "square": lambda v: v**2, "relu": lambda v: sympy.Max(v, 0),
            "sigmoid": lambda v: 1 / (1 + sympy.exp(-v)),
        }  # fmt: skip
        part = _softplus(step.node) if step.name == "softplus" else functions[step.name](ex.x)
        self.items.append(("map", part))
        self.transforms.append(ir.Elementwise(value=part))

    def add_sink(self, step: Step) -> None:
        if self.sink is not None:
            raise Declined("sink-twice", "more than one logit is concatenated to the scores")
        if step.term is None:
            assert step.value is not None
            self.sink = step.value
        else:
            if set(axes_of(step.layout)) & set(self.roles.keys):
                raise Declined("sink-keys", "a concatenated logit depends on the key")
            value = self.element(step.term, step.layout)
            self.sink = self.dense(step.term, step.layout) if value is None else value
        self.transforms.append(ir.Sink(logit=self.sink))


def prove(
    candidate: Candidate,
    evaluator: ElementEvaluator,
    differentiable: Collection[fx.Node] = frozenset(),
) -> Proven:
    """Turn a candidate's steps into a program.

    Args:
        candidate: What detection found.
        evaluator: Of the candidate's shadow; shared by its sites, so that a mask is proven once.
        differentiable: The shadow nodes that may need a gradient.
    Raises:
        Declined: A step has no place in a program, or cannot be replaced exactly.
    """
    found = [sources(candidate.q, fold_factors=True), sources(candidate.k, fold_factors=True)]
    found.append(sources(candidate.v, fold_factors=False))
    roles = assign_roles(candidate, *found)
    q, k, v = choose(found, roles)
    builder = _Builder(candidate, roles, evaluator, differentiable)
    builder.scale = candidate.factor * q.factor * k.factor
    if builder.scale != 1:
        builder.transforms.append(ir.Scale(factor=sympy.Float(float(builder.scale))))
    for step in candidate.steps:
        _apply(builder, step)
    needs_grad = bool({q.tensor.node, k.tensor.node} & differentiable)
    keep, score, empty_rows, may_be_empty, absorbed = _assemble(builder, candidate, needs_grad)
    weight, v_factors, out_factors = _after_softmax(builder, candidate)
    if weight is not None and empty_rows == "nan":
        if weight != ex.Truth(keep):
            raise Declined("empty-rows", "weights of rows without a key are partly overwritten")
        weight, empty_rows = None, "zero"
    keep_atoms = prove_mask.classify(keep, roles.sizes()) if keep is not sympy.true else ()
    if candidate.dropout_p:
        builder.transforms.append(ir.Dropout(p=candidate.dropout_p))
    program = ir.ScoreProgram(
        scale=float(builder.scale), score=score, keep=keep, empty_rows=empty_rows,
        sink=builder.sink, weight=weight,
    )  # fmt: skip
    return Proven(
        candidate=candidate,
        roles=roles,
        q=q,
        k=k,
        v=v,
        program=program,
        operands=tuple(builder.operands),
        transforms=_readable(builder.transforms),
        mask=ir.MaskProof(atoms=keep_atoms, opaque=builder.opaque_mask),
        may_be_empty=may_be_empty,
        absorbed=absorbed and needs_grad,
        q_factors=tuple(builder.q_factors),
        v_factors=tuple(v_factors),
        out_factors=tuple(out_factors),
    )


def _apply(builder: _Builder, step: Step) -> None:
    if step.kind == "cast":
        return
    if builder.sink is not None and step.kind != "sink":
        raise Declined("sink-order", "scores are changed after a logit was concatenated")
    if step.kind in ("mul", "div"):
        builder.multiply(step)
    elif step.kind in ("add", "sub"):
        sign = sympy.Integer(1 if step.kind == "add" else -1)
        if step.term is None or not voc.is_tensor(step.term):
            raise Declined("score-op", "a number is added to the scores before another function")
        factor = sign * (step.value if step.value is not None else 1)
        builder.add(step.term, step.layout, factor, step.cuts)
    elif step.kind == "fill":
        builder.fill(step)
    elif step.kind == "unary":
        builder.unary(step)
    elif step.kind in ("min", "max"):
        builder.bound(step)
    elif step.kind == "sink":
        builder.add_sink(step)
    else:
        raise Declined("score-op", f"the scores are subtracted from {step.term or step.value}")


def _assemble(
    builder: _Builder, candidate: Candidate, needs_grad: bool
) -> tuple[sympy.Basic, sympy.Expr, ir.EmptyRows, bool, bool]:
    """Fold the collected items into one score formula and one predicate."""
    plain = all(kind in ("mask", "floor") for kind, _ in builder.items)
    masks = [item for kind, item in builder.items if kind == "mask"]
    keep = prove_mask.normalise(sympy.And(*(mask.keep for mask in masks)), builder.ranges)
    may_be_empty = keep is not sympy.true and prove_mask.row_may_be_empty(keep, builder.ranges)
    floored = any(kind == "floor" for kind, _ in builder.items)
    finite = [mask for mask in masks if mask.fill != -sympy.oo or floored]
    score: sympy.Expr = ex.x
    kept: list[sympy.Basic] = []
    for position, (kind, item) in enumerate(builder.items):
        later = [k for k, _ in builder.items[position + 1 :] if k != "floor"]
        if kind == "bias":
            score = score + item
        elif kind == "map":
            score = item.subs(ex.x, score)
        elif kind == "mask":
            plain = item.absorbing or item.fill <= ABSORBED
            exact = (
                item in finite and may_be_empty and (not plain or len(masks) > 1 or "bias" in later)
            )
            if "map" in later or exact:
                fill = max(item.fill, sympy.Float(torch.finfo(torch.float32).min))
                score = (
                    Where(item.keep, score, fill)
                    if item.absorbing
                    else score + Where(item.keep, 0, fill)
                )
            else:
                kept.append(item.keep)
    keep = prove_mask.normalise(sympy.And(*kept), builder.ranges)
    may_be_empty = keep is not sympy.true and may_be_empty
    empty: ir.EmptyRows = "zero"
    if may_be_empty and not candidate.nan_to_zero:
        empty = "uniform" if all(mask in finite for mask in masks) else "nan"
    elif may_be_empty and masks and all(mask in finite for mask in masks):
        empty = "uniform"
    absorbed = may_be_empty and empty == "uniform" and not all(m.absorbing for m in masks)
    return keep, score, empty, may_be_empty, absorbed


def _after_softmax(
    builder: _Builder, candidate: Candidate
) -> tuple[sympy.Expr | None, list[Factor], list[Factor]]:
    """Sort what happens to the weights: onto V, onto the output, or into the program."""
    roles = builder.roles
    weight: sympy.Expr | None = None
    v_factors: list[Factor] = []
    out_factors: list[Factor] = []
    for step in candidate.post:
        zero_if = None if step.kind != "fill" else not step.keep_if
        factor = Factor(
            step.term, resolve_layout(step.layout), step.value, step.kind == "div", zero_if
        )
        here = set(axes_of(step.layout))
        if not here & set(roles.keys):
            out_factors.append(factor)
        elif not here & {*roles.queries, *roles.group}:
            v_factors.append(factor)
        else:
            weight = (weight or sympy.Integer(1)) * _weight(builder, step)
        text = sympy.Symbol(step.term.name) if step.term is not None else step.value
        builder.transforms.append(ir.WeightFactor(factor=text))
    return weight, v_factors, out_factors


def _weight(builder: _Builder, step: Step) -> sympy.Expr:
    assert step.term is not None
    if step.kind == "fill":
        found = builder.element(step.term, step.layout)
        keep = _boolean(builder.dense(step.term, step.layout) if found is None else found)
        return ex.Truth(keep if step.keep_if else sympy.Not(keep))
    value = builder.number(step.term, step.layout)
    if value is None:
        value = builder.dense(step.term, step.layout)
    return 1 / value if step.kind == "div" else value


def choose(found: Sequence[Sequence[Source]], roles: Roles) -> tuple[Source, Source, Source]:
    """For Q, K and V the node to read: as far back as dtypes allow, least rearranged."""
    deepest = {options[-1].dtype for options in found}
    if len(deepest) != 1:
        found = [[o for o in options if o.dtype == options[0].dtype] for options in found]
    orders = (
        (roles.batch, roles.query_heads, roles.queries, roles.head),
        (roles.batch, roles.kv_heads, roles.keys, roles.head),
        (roles.batch, roles.kv_heads, roles.keys, roles.value),
    )
    return tuple(_least_moved(o, order) for o, order in zip(found, orders, strict=True))  # type: ignore[return-value]


def _least_moved(options: Sequence[Source], order: Sequence[tuple[Any, ...]]) -> Source:
    last = options[-1]
    for option in options:
        if option.factor != last.factor or option.dtype != last.dtype:
            continue
        if resolve_layout(option.tensor.layout) == tuple(order):
            return option
    return last


def _softplus(node: fx.Node) -> sympy.Expr:
    """`softplus(x, beta, threshold)`: linear where `beta * x` is above the threshold."""
    beta = voc.number(voc.argument(node, 1, "beta", 1))
    threshold = voc.number(voc.argument(node, 2, "threshold", 20))
    if beta is None or threshold is None or not beta.is_number:
        raise Declined("score-op", "a softplus of the scores has a beta that is no number")
    power = beta * ex.x
    return Where(power > threshold, ex.x, sympy.log(1 + sympy.exp(power)) / beta)


def _boolean(value: sympy.Basic) -> sympy.Basic:
    if value in (sympy.true, sympy.false):
        return value
    if ex.is_predicate(value):
        return value
    return sympy.Ne(value, 0)


_MOVES = voc.RESHAPES | voc.SAME | voc.CASTS | {"slice", "expand", "select", "permute", "transpose"}


def _fill(value: float | None) -> sympy.Expr:
    assert value is not None
    return -sympy.oo if value == float("-inf") else sympy.Float(value)


def _is_binary(term: fx.Node, element: sympy.Basic | None) -> bool:
    """Whether a tensor that is used as a mask holds nothing but 0 and 1."""
    if term.meta["val"].dtype == torch.bool or isinstance(element, ex.Truth):
        return True
    if voc.op_name(term) in voc.CASTS and voc.is_tensor(term.args[0]):
        return _is_binary(term.args[0], None)  # type: ignore[arg-type]
    if isinstance(element, Where):
        return all(part in (0, 1) or _is_binary(term, part) for part in element.args[1:])
    return element in (0, 1)


def _may_mask(term: fx.Node) -> bool:
    """Whether a tensor that stays a bias may also mask keys: it has minus infinity in its making."""
    pending, seen = [term], set()
    while pending and len(seen) < 40:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and all(voc.op_name(n) in _MOVES for n in seen - {node}):
            return True  # handed in by the caller
        if voc.plain_name(node) in ("where", "masked_fill", "full"):
            return True
        pending.extend(node.all_input_nodes)
    return False


def _bias_text(bias: sympy.Expr) -> str:
    if any({ex.s, ex.t} <= load.free_symbols for load in bias.atoms(Load)):
        return "by distance"
    if bias.has(ex.s) and bias.has(Load) and not bias.has(Where):
        distance = sympy.diff(bias, ex.s)
        if not distance.has(ex.s) and not distance.has(ex.t):
            return "alibi"
    return ""


def _readable(transforms: Sequence[ir.ScoreTransform]) -> tuple[ir.ScoreTransform, ...]:
    """Read `scale(1/c), tanh, scale(c)` as one soft cap, and merge constant scales."""
    out: list[ir.ScoreTransform] = []
    pending = list(transforms)
    while pending:
        first, *pending = pending
        if _is_tanh(first) and out and pending:
            before, after = out[-1], pending[0]
            if _constant(before) and _constant(after):
                cap = after.factor  # type: ignore[union-attr]
                rest = before.factor * cap  # type: ignore[union-attr]
                out[-1:] = [] if abs(float(rest) - 1) < 1e-6 else [ir.Scale(factor=rest)]
                out.append(ir.SoftCap(cap=cap))
                pending = pending[1:]
                continue
        if _constant(first):
            factor = first.factor  # type: ignore[union-attr]
            if out and _constant(out[-1]):
                factor = factor * out.pop().factor  # type: ignore[union-attr]
            if factor == 1:
                continue
            first = ir.Scale(factor=factor)
        out.append(first)
    return tuple(out)


def _constant(transform: ir.ScoreTransform) -> bool:
    return isinstance(transform, ir.Scale) and transform.factor.is_number


def _is_tanh(transform: ir.ScoreTransform) -> bool:
    return isinstance(transform, ir.Elementwise) and transform.value == sympy.tanh(ex.x)
