"""Sympy expressions as people write them: `t - s < 512`, `⌊t/8⌋ = ⌊s/8⌋`, `mask[b, s] ≠ 0`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sympy.printing.precedence import PRECEDENCE, precedence
from sympy.printing.str import StrPrinter

from sparse_compile import ir

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sympy

_RELATIONS = {"==": "=", "!=": "≠", "<=": "≤", ">=": "≥", "<": "<", ">": ">"}


def readable(expression: sympy.Basic, operands: Sequence[ir.Operand] = ()) -> str:
    """One line of mathematics; loads are shown by the names of their operands."""
    return _Readable(operands).doprint(expression)


def transform_text(transform: ir.ScoreTransform, operands: Sequence[ir.Operand] = ()) -> str:
    """A score transform by name, its formula readable."""
    if isinstance(transform, ir.Bias):
        return f"bias({transform.text or readable(transform.value, operands)})"
    if isinstance(transform, ir.Elementwise):
        return f"map({readable(transform.value, operands)})"
    if isinstance(transform, ir.Sink):
        return f"sink({readable(transform.logit, operands)})"
    if isinstance(transform, ir.WeightFactor):
        return f"weight({readable(transform.factor, operands)})"
    if isinstance(transform, ir.Scale) and not transform.factor.is_number:
        return f"scale({readable(transform.factor, operands)})"
    return str(transform)


class _Readable(StrPrinter):
    """Sympy's text printer with the signs of a textbook."""

    def __init__(self, operands: Sequence[ir.Operand]) -> None:
        super().__init__({"order": "none"})
        self._operands = operands

    def _print_Load(self, expression: sympy.Expr) -> str:
        number, *indices = expression.args
        known = number.is_Integer and 0 <= int(number) < len(self._operands)
        name = self._operands[int(number)].name if known else f"operand{number}"
        return f"{name}[{', '.join(self._print(index) for index in indices)}]" if indices else name

    def _print_Where(self, expression: sympy.Expr) -> str:
        condition, first, second = (self._print(part) for part in expression.args)
        return f"({first} if {condition} else {second})"

    def _print_Truth(self, expression: sympy.Expr) -> str:
        return f"[{self._print(expression.args[0])}]"

    def _print_floor(self, expression: sympy.Expr) -> str:
        return f"⌊{self._print(expression.args[0])}⌋"

    def _print_ceiling(self, expression: sympy.Expr) -> str:
        return f"⌈{self._print(expression.args[0])}⌉"

    def _print_Abs(self, expression: sympy.Expr) -> str:
        return f"|{self._print(expression.args[0])}|"

    def _print_FloorDiv(self, expression: sympy.Expr) -> str:
        above, below = (self.parenthesize(part, PRECEDENCE["Mul"]) for part in expression.args)
        return f"⌊{above}/{below}⌋"

    def _print_Mod(self, expression: sympy.Expr) -> str:
        left, right = (self.parenthesize(part, PRECEDENCE["Mul"]) for part in expression.args)
        return f"{left} mod {right}"

    _print_PythonMod = _print_Mod

    def _print_Relational(self, expression: sympy.Basic) -> str:
        left, right = (
            self.parenthesize(side, PRECEDENCE["Relational"])
            for side in (expression.lhs, expression.rhs)
        )
        return f"{left} {_RELATIONS[expression.rel_op]} {right}"

    def _print_And(self, expression: sympy.Basic) -> str:
        return self._joined(expression, " and ")

    def _print_Or(self, expression: sympy.Basic) -> str:
        return self._joined(expression, " or ")

    def _print_Not(self, expression: sympy.Basic) -> str:
        return f"not {self.parenthesize(expression.args[0], PRECEDENCE['Not'])}"

    def _print_Pow(self, expression: sympy.Expr, rational: bool = False) -> str:
        return super()._print_Pow(expression, rational=rational).replace("**", "^")

    def _print_Float(self, expression: sympy.Float) -> str:
        return f"{float(expression):.6g}"

    def _print_BooleanTrue(self, expression: sympy.Basic) -> str:
        return "always"

    def _print_BooleanFalse(self, expression: sympy.Basic) -> str:
        return "never"

    def _joined(self, expression: sympy.Basic, word: str) -> str:
        parts = (
            f"({self._print(part)})"
            if precedence(part) < PRECEDENCE["Relational"]
            else self._print(part)
            for part in expression.args
        )
        return word.join(sorted(parts, key=len))
