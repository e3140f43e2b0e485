"""Replace sites in a Dynamo graph.

Before:  m = matmul(q, k.mT) * c;  p = softmax(m + causal);  o = matmul(p, v)
After:   o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=c)
Skips:   sites whose tensors are overwritten between their use and the output, or whose values
         cannot be had in front of it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparse_compile.ir import KernelPlan, Reason
from sparse_compile.passes.candidates import Declined
from sparse_compile.passes.emit import Emitter, set_example_value
from sparse_compile.passes.lower_paged import PAGED_KERNELS
from sparse_compile.passes.lowering import lower
from sparse_compile.passes.mutation import first_write, overwritten
from sparse_compile.passes.paged_sites import Paged

if TYPE_CHECKING:
    from sparse_compile.passes.programs import OperandRef, Proven
    from sparse_compile.passes.shadow import Shadow


@dataclass(frozen=True)
class Replacement:
    """What became of one site: the nodes written for it, or why it was left alone."""

    new: tuple[fx.Node, ...] = ()
    value: fx.Node | None = None  # the node that has the site's output now
    recomputed: tuple[tuple[fx.Node, fx.Node], ...] = ()  # shadow -> new node of equal value
    reason: Reason | None = None


def rewrite(
    gm: fx.GraphModule, shadow: Shadow, jobs: Sequence[tuple[Proven, KernelPlan]]
) -> list[Replacement]:
    """Splice replacements into a Dynamo graph; sites that cannot be are left as they were.

    Args:
        gm: The Dynamo graph that `shadow` was traced from; edited.
        shadow: Its shadow.
        jobs: Sites with their plans.
    Returns:
        One result per job.
    """
    results = [Replacement()] * len(jobs)
    by_owner: dict[fx.Node, list[int]] = {}
    for number, (proven, _) in enumerate(jobs):
        by_owner.setdefault(shadow.owner(proven.candidate.out.node), []).append(number)
    dead: list[fx.Node] = []
    shared: dict[Any, tuple[fx.Node, ...]] = {}
    swapped: dict[fx.Node, fx.Node] = {}
    for owner, numbers in sorted(by_owner.items(), key=lambda item: shadow.order[item[0]]):
        emitter = Emitter(gm, shadow, owner, shared, swapped)
        for number in numbers:
            results[number] = _write(emitter, *jobs[number])
        if emitter.replaced and any(results[n].reason is None for n in numbers):
            reason = _swap(emitter, owner)
            if reason is None:
                dead.append(owner)
            else:
                _undo(emitter)
                for number in numbers:
                    results[number] = Replacement(reason=results[number].reason or reason)
    _remove_dead(gm.graph, dead)
    gm.graph.lint()
    gm.recompile()
    return results


def _write(emitter: Emitter, proven: Proven, plan: KernelPlan) -> Replacement:
    out = proven.candidate.out.node
    start = len(emitter.new)
    if plan.flags.get("kept"):
        return Replacement(value=emitter.shadow.origins.get(out))
    try:
        fixed, operands = _inputs(proven, plan)
        reads = [*fixed, *(node for ref in operands for node in ref.nodes)]
        factors = (*proven.q_factors, *proven.v_factors, *proven.out_factors)
        reads += [factor.term for factor in factors if factor.term is not None]
        while (lost := overwritten(emitter.shadow, reads, out)) is not None:
            if lost in fixed or not _save(emitter, lost, out):
                name = lost.name
                raise Declined("overwritten", f"{name} is overwritten before the attention ends")
            reads.remove(lost)
        replacement = lower(emitter, proven, plan)
    except Declined as declined:
        for node in reversed(emitter.new[start:]):
            emitter.graph.erase_node(node)
        del emitter.new[start:]
        emitter.forget_erased()
        return Replacement(reason=declined.reason)
    recomputed = tuple(emitter.replaced.items())
    emitter.replaced[out] = replacement
    return Replacement(new=tuple(emitter.new[start:]), value=replacement, recomputed=recomputed)


def _inputs(proven: Proven, plan: KernelPlan) -> tuple[tuple[fx.Node, ...], tuple[OperandRef, ...]]:
    """What a replacement reads: Q and where its keys and values are, and what formulas load from."""
    if plan.kernel in PAGED_KERNELS:
        assert isinstance(proven.paged, Paged)
        is_sparse = plan.kernel == "progressive_attention"
        reads = proven.paged.sketched if is_sparse else proven.paged.reads
        return (proven.q.tensor.node, *reads), proven.paged.operands
    return tuple(source.tensor.node for source in (proven.q, proven.k, proven.v)), proven.operands


def _save(emitter: Emitter, node: fx.Node, out: fx.Node) -> bool:
    """Copy an operand before it is overwritten, e.g. a cache's position that the model counts up."""
    shadow = emitter.shadow
    origin = shadow.origins.get(node)
    place = shadow.owner(first_write(shadow, node, out))
    value = node.meta["val"]
    if origin is None or shadow.order[origin] >= shadow.order[place] or value.dim() > 2:
        return False
    with emitter.graph.inserting_before(place):
        copy = emitter.graph.call_method("clone", (origin,))
    copy.meta.update({k: v for k, v in place.meta.items() if k != "example_value"})
    set_example_value(copy, shadow.mode)
    emitter.replaced[node] = copy
    emitter.new.append(copy)
    return True


def _swap(emitter: Emitter, owner: fx.Node) -> Reason | None:
    """Let the users of the values that `owner` computed use the replacements."""
    shadow = emitter.shadow
    swaps: list[tuple[fx.Node, fx.Node]] = []
    try:
        for node, dynamo_nodes in shadow.aliases.items():
            if node.meta.get("dynamo") is not owner:
                continue
            for dynamo in dynamo_nodes:
                if dynamo is owner or _is_item_of(dynamo, owner):
                    swaps.append((dynamo, emitter.value_after(node)))
    except Declined as declined:
        return declined.reason
    if not swaps:
        return Reason(code="value-unavailable", message="the output has no node in the graph")
    emitter.swapped.update(swaps)
    for old, new in swaps:
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in emitter.new)
        _loosen_views(new)
    return None


def _is_item_of(node: fx.Node, owner: fx.Node) -> bool:
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if node is owner:
            return True
    return False


def _undo(emitter: Emitter) -> None:
    for node in reversed(emitter.new):
        emitter.graph.erase_node(node)
    emitter.new.clear()
    emitter.forget_erased()


_MOVES = frozenset(
    [
        "view",
        "reshape",
        "permute",
        "transpose",
        "contiguous",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
    ]
)


def _loosen_views(node: fx.Node) -> None:
    """Turn `view` into `reshape` behind a replacement, whose strides may differ."""
    pending = list(node.users)
    while pending:
        user = pending.pop()
        name = user.target if user.op == "call_method" else ""
        sizes = user.args[1:]
        if name == "view" and not any(isinstance(size, torch.dtype) for size in sizes):
            user.target = "reshape"
        elif user.op == "call_function" and user.target is torch.ops.aten.view.default:
            user.target = torch.ops.aten.reshape.default
        if name in _MOVES or user.target is torch.ops.aten.reshape.default:
            pending.extend(user.users)


def _remove_dead(graph: fx.Graph, roots: Sequence[fx.Node]) -> None:
    """Erase nodes that nobody uses any more, from `roots` backwards; what has effects stays."""
    pending = list(roots)
    for root in roots:  # results of a function that nobody took
        pending.extend(user for user in root.users if user.target is operator.getitem)
    while pending:
        node = pending.pop()
        if node.users or node._erased or has_effect(node):
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        pending.extend(inputs)


def has_effect(node: fx.Node) -> bool:
    """Whether a torch-level node does something besides computing its value."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr":
        return False
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        return True
    target: Any = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if getattr(target, "__module__", "") in ("_operator", "math", "builtins"):
        return target in (operator.setitem, operator.delitem) or _is_in_place(target.__name__)
    name = getattr(target, "__name__", "")
    if "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    return name.endswith("_") or name.startswith("_") or not _is_torch_function(target)


def _is_in_place(name: str) -> bool:
    """Whether an operator's name is that of an assignment like `iadd`."""
    plain = name[1:]
    return name[0] == "i" and (hasattr(operator, plain) or hasattr(operator, f"{plain}_"))


def _is_torch_function(target: Any) -> bool:
    module = getattr(target, "__module__", None) or ""
    return module.startswith(("torch._C", "torch.functional", "torch.nn.functional", "torch")) or (
        target in vars(torch).values()
    )
