"""Dynamo calls that become one ATen operator with the same arguments.

Tracing an operator costs a millisecond; for these the shadow's node can be written down, since
Dynamo has already computed what they give. Everything else is traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_aten = torch.ops.aten

# Functions whose positional arguments are the operator's.
_FUNCTIONS: dict[Any, Any] = {
    F.linear: _aten.linear.default,
    F.gelu: _aten.gelu.default,
    torch.matmul: _aten.matmul.default,
    operator.matmul: _aten.matmul.default,
    torch.bmm: _aten.bmm.default,
    torch.neg: _aten.neg.default,
    operator.neg: _aten.neg.default,
    torch.rsqrt: _aten.rsqrt.default,
    torch.sqrt: _aten.sqrt.default,
    torch.tanh: _aten.tanh.default,
    torch.sigmoid: _aten.sigmoid.default,
    torch.exp: _aten.exp.default,
    torch.cos: _aten.cos.default,
    torch.sin: _aten.sin.default,
}
_WITHOUT_INPLACE = {F.silu: _aten.silu.default, F.relu: _aten.relu.default}
_ARITHMETIC = {
    operator.mul: _aten.mul.Tensor,
    torch.mul: _aten.mul.Tensor,
    operator.add: _aten.add.Tensor,
    torch.add: _aten.add.Tensor,
    operator.sub: _aten.sub.Tensor,
    operator.truediv: _aten.div.Tensor,
}
_SWAPPED = (operator.mul, operator.add)  # number * tensor is tensor * number
_METHODS = {
    "transpose": _aten.transpose.int,
    "unsqueeze": _aten.unsqueeze.default,
    "contiguous": _aten.contiguous.default,
    "cos": _aten.cos.default,
    "sin": _aten.sin.default,
    "matmul": _aten.matmul.default,
}
_SIZED = {
    "view": _aten.view.default,
    "reshape": _aten.reshape.default,
    "expand": _aten.expand.default,
    "permute": _aten.permute.default,
}
# After one of these a tensor's example no longer has the sizes it had when it was made.
_RESHAPES_IN_PLACE = frozenset(
    [
        "unsqueeze_",
        "squeeze_",
        "transpose_",
        "t_",
        "swapaxes_",
        "swapdims_",
        "as_strided_",
        "resize_",
        "resize_as_",
        "set_",
        "detach_",
    ]
)

Call = tuple[Any, tuple[Any, ...], Mapping[str, Any]]


def has_stable_examples(graph: fx.Graph) -> bool:
    """Whether the examples of a Dynamo graph still have the sizes they had when they were made."""
    targets = (getattr(node.target, "__name__", node.target) for node in graph.nodes)
    return not any(target in _RESHAPES_IN_PLACE for target in targets)


def aten_call(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """The operator that a Dynamo call becomes, with its arguments; None for what must be traced.

    Args:
        node: The call.
        args: Values of its arguments.
        kwargs: Values of its keyword arguments.
    """
    find = _of_method if node.op == "call_method" else _of_function
    found = find(node.target, tuple(args), kwargs)
    if found is None or not all(map(_is_plain, (*found[1], *found[2].values()))):
        return None
    return found


def _of_function(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    if target in _ARITHMETIC:
        return None if kwargs else _arithmetic(target, args)
    if target is operator.getitem:
        return _slice(*args)
    if target is torch.cat:
        return _cat(*args, **kwargs)
    if target in _WITHOUT_INPLACE:
        is_inplace = kwargs.get("inplace", False) or len(args) > 1
        return None if is_inplace else (_WITHOUT_INPLACE[target], args, {})
    found = _FUNCTIONS.get(target) if isinstance(target, Callable) else None
    return None if found is None or "out" in kwargs else (found, args, kwargs)


def _of_method(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    if target in _SIZED and not kwargs:
        sizes = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        return (_SIZED[target], (args[0], list(sizes)), {}) if _are_whole(sizes) else None
    if target == "pow" and not kwargs and isinstance(args[1], (int, float)):
        return _aten.pow.Tensor_Scalar, args, {}
    if target == "mean" and len(args) == 2 and set(kwargs) <= {"keepdim"}:
        dims = args[1] if isinstance(args[1], (tuple, list)) else [args[1]]
        keep = (True,) if kwargs.get("keepdim") else ()
        return (_aten.mean.dim, (args[0], list(dims), *keep), {}) if _are_whole(dims) else None
    if target == "transpose" and (kwargs or not _are_whole(args[1:])):
        return None
    found = _METHODS.get(target)
    return None if found is None or kwargs else (found, args, {})


def _arithmetic(target: Any, args: tuple[Any, ...]) -> Call | None:
    first, second = args
    if not isinstance(first, Tensor):
        if target not in _SWAPPED:
            return None
        first, second = second, first
    return _ARITHMETIC[target], (first, second), {}


def _cat(tensors: Any = (), dim: Any = None, **others: Any) -> Call | None:
    if others or type(dim) is not int or not isinstance(tensors, (tuple, list)):
        return None
    return _aten.cat.default, (list(tensors), *([dim] if dim else [])), {}


def _slice(source: Any, index: Any) -> Call | None:
    """`x[..., start:stop]`."""
    if not isinstance(source, Tensor) or not isinstance(index, tuple) or len(index) != 2:
        return None
    dots, cut = index
    if dots is not Ellipsis or not isinstance(cut, slice) or cut.step is not None:
        return None
    start = 0 if cut.start is None else cut.start
    stop = 2**63 - 1 if cut.stop is None else cut.stop
    if not _are_whole((start, stop)):
        return None
    return _aten.slice.Tensor, (source, source.dim() - 1, start, stop), {}


def _are_whole(values: Sequence[Any]) -> bool:
    return all(type(value) is int or isinstance(value, torch.SymInt) for value in values)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.SymInt))
