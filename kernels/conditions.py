"""Conditions of tuning tables: formulas over integers, never executed as Python."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"max": max, "min": min}
ALLOWED = "integers, names, + - * // %, comparisons, and, or, not, max() and min()"


class Condition:
    """A formula such as `head_dim * itemsize <= 256 and num_warps > 2`.

    Args:
        text: The formula.
        known: The names that it may use.

    Raises:
        ValueError: It is no such formula, or uses another name; the message is part of a sentence.
    """

    def __init__(self, text: str, known: Iterable[str]) -> None:
        """Parse and check the whole formula, so that no candidate can fail later."""
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"cannot be read ({error.args[0]})") from None
        _check(self._tree, frozenset(known))

    def __call__(self, names: Mapping[str, int]) -> bool:
        """Whether it holds; a division by zero does not."""
        try:
            return bool(_value(self._tree, names))
        except ZeroDivisionError:
            return False

    def __str__(self) -> str:
        return self.text


def _check(node: ast.expr, known: frozenset[str]) -> None:
    """Refuse everything that `_value` cannot compute."""
    if isinstance(node, ast.Constant):
        if type(node.value) is not int:
            raise ValueError(f"holds {node.value!r}, which is no integer")
        return
    if isinstance(node, ast.Name):
        if node.id not in known:
            raise ValueError(f'speaks of "{node.id}"; known are {", ".join(sorted(known))}')
        return
    if isinstance(node, ast.BoolOp):
        parts: list[ast.expr] = node.values
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        parts = [node.operand]
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        parts = [node.left, node.right]
    elif isinstance(node, ast.Compare) and all(type(op) in _COMPARISONS for op in node.ops):
        parts = [node.left, *node.comparators]
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and len(node.args) > 1
        and not node.keywords
    ):
        parts = node.args
    else:
        raise ValueError(f'holds "{ast.unparse(node)}"; allowed are {ALLOWED}')
    for part in parts:
        _check(part, known)


def _value(node: ast.expr, names: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.BoolOp):
        every = isinstance(node.op, ast.And)
        return (all if every else any)(_value(part, names) for part in node.values)
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, names)
        return not value if isinstance(node.op, ast.Not) else -value
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_value(node.left, names), _value(node.right, names))
    if isinstance(node, ast.Compare):
        left = _value(node.left, names)
        for op, part in zip(node.ops, node.comparators, strict=True):
            right = _value(part, names)
            if not _COMPARISONS[type(op)](left, right):
                return False
            left = right
        return True
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    return _FUNCTIONS[node.func.id](*(_value(part, names) for part in node.args))
