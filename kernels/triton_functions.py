"""Triton device functions printed from the formulas of a score program.

A function's text depends on the program, on what kind of operands it reads and on whether 32 bits
are enough; not on sizes or strides, which are arguments. Functions are made once per text, and the
text itself is what Triton's caches of compiled kernels know them by.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import sympy
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.evaluation import Source, evaluate
from sparse_compile.expressions import Load, b, derivative, h, s, t, x
from sparse_compile.intervals import Interval, bounds
from sparse_compile.kernels import triton_math
from sparse_compile.kernels.program_attention_cpu import parsed, slopes_of
from sparse_compile.kernels.triton_text import Body, Text

if TYPE_CHECKING:
    from sparse_compile.ir import ScoreProgram

LOG2_E = 1.4426950408889634
SMALL_TOKENS = 2**24  # positions below this: sums and differences of two stay exact in float32
SMALL_HEADS = 2**12
_INDEX_LIMITS = {b: 2**20, h: SMALL_HEADS, t: SMALL_TOKENS, s: SMALL_TOKENS}
_DTYPES = {
    torch.float64: "float", torch.float32: "float", torch.float16: "float", torch.bfloat16: "float",
    torch.bool: "bool", torch.uint8: "uint8", torch.int8: "int32", torch.int16: "int32",
    torch.int32: "int32", torch.int64: "int64",
}  # fmt: skip


class Kind(NamedTuple):
    """All that a printed function knows of an operand."""

    value: str  # "float", "bool", "uint8", "int32" or "int64"
    rank: int
    is_near: bool  # its elements are less than 2 ** 31 apart


class Request(NamedTuple):
    """What decides the text of a program's functions."""

    program: str
    kinds: tuple[Kind, ...]
    is_large: bool  # more tokens or heads than small numbers hold
    tanh: str
    wanted: tuple[int, ...] = ()  # the operands whose gradients are wanted


class Functions(NamedTuple):
    """A program's device functions; None for what it does not have."""

    keep: Any  # (b, h, t, s, operands, places): whether the key is read
    logit: Any  # (raw, b, h, t, s, operands, places): the logit in base 2, of q . k
    logit_and_slope: Any  # the same, and d score / d (q . k)
    sink: Any  # (b, h, t, operands, places): the sink's logit in base 2
    scatter: Any  # adds to gradients of operands


def request(
    program: str,
    operands: Sequence[Tensor],
    q: Tensor,
    n_keys: int,
    *,
    wanted: tuple[int, ...] = (),
    approximate: bool = True,
) -> Request:
    """What to print for these arguments.

    Args:
        program: Encoded.
        operands: What it loads from.
        q: Queries, [B, Hq, T, D].
        n_keys: S.
        wanted: The operands whose gradients are wanted.
        approximate: Whether bfloat16 may have the machine's own tanh, which the interpreter lacks.
    """
    kinds = tuple(
        Kind(_DTYPES[operand.dtype], operand.dim(), _extent(operand) < 2**31)
        for operand in operands
    )
    is_large = max(q.shape[2], n_keys) > SMALL_TOKENS or q.shape[1] > SMALL_HEADS
    tanh = "tanh_accurate" if q.dtype == torch.float32 else "tanh_fast"
    if approximate and q.dtype == torch.bfloat16:
        tanh = "tanh_approximate"
    return Request(program, kinds, is_large, tanh, wanted)


def arguments(operands: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The operands as a kernel takes them, and the stride and size of each of their axes."""
    pointers = tuple(
        operand.view(torch.uint8) if operand.dtype == torch.bool else operand
        for operand in operands
    )
    places = (
        number for operand in operands for pair in zip(operand.stride(), operand.shape, strict=True)
        for number in pair
    )  # fmt: skip
    return pointers, tuple(places)


def _extent(operand: Tensor) -> int:
    pairs = zip(operand.shape, operand.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in pairs)


@functools.lru_cache(maxsize=1024)
def functions(wanted: Request) -> Functions:
    """The device functions of a program.

    Raises:
        NotImplementedError: A formula has no Triton text.
    """
    program = parsed(wanted.program)
    score = base_two_logit(program)
    plain = is_plain(program)
    return Functions(
        keep=None if program.keep is sympy.true else make(_keep_text(wanted), "keep"),
        logit=None if plain else make(_score_text(wanted, [score]), "logit"),
        logit_and_slope=None
        if plain
        else make(_score_text(wanted, [score, raw_slope(program)]), "logit"),
        sink=None if program.sink is None else make(_sink_text(wanted), "sink"),
        scatter=make(_scatter_text(wanted), "scatter") if _scattered(wanted) else None,
    )


def is_plain(program: ScoreProgram) -> bool:
    """Whether the logit is q . k times a positive number."""
    return program.score == x and program.scale > 0


def base_two_logit(program: ScoreProgram) -> sympy.Expr:
    """The logit as a function of `x = q . k`, for powers of two; constants are multiplied out."""
    score = program.score.xreplace({x: sympy.Float(program.scale) * x})
    return sympy.Add(*(sympy.Float(LOG2_E) * term for term in sympy.Add.make_args(score)))


def raw_slope(program: ScoreProgram) -> sympy.Expr:
    """The derivative of the score with respect to `q . k`."""
    slope = derivative(program.score, x).xreplace({x: sympy.Float(program.scale) * x})
    return sympy.Float(program.scale) * slope


def make(text: str, name: str) -> Any:
    """The Triton function that a text defines."""
    file = f"<sparse_compile {name} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    # Triton and tracebacks read the text from here
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space: dict[str, Any] = {"tl": tl, "__name__": __name__}
    space.update((one, getattr(triton_math, one)) for one in _HELPERS)
    exec(compile(text, file, "exec"), space)
    return triton.jit(space[name])


_HELPERS = ("floor_div", "floor_mod", "tanh_accurate", "tanh_fast", "tanh_approximate")


def _define(name: str, parameters: str, body: Body, last: str) -> str:
    lines = [f"def {name}({parameters}):", *(f"    {line}" for line in body.lines), f"    {last}"]
    return "\n".join(lines) + "\n"


def _truth(value: Any) -> str:
    return value.code if isinstance(value, Text) else f"tl.full([], {bool(value)}, tl.int1)"


def _number(body: Body, value: Any) -> str:
    if isinstance(value, Text) and value.dtype != "constant":
        return value.to(torch.float32).code
    code = value.code if isinstance(value, Text) else body.constant(float(value)).code
    return f"tl.full([], {code}, tl.float32)"


class _Scope:
    """One function's body and the values of indices and operands in it."""

    def __init__(self, wanted: Request) -> None:
        self.wanted = wanted
        self.body = Body(tanh=wanted.tanh)
        limits = dict.fromkeys(_INDEX_LIMITS, 2**31) if wanted.is_large else _INDEX_LIMITS
        self.env: dict[sympy.Basic, Any] = {
            symbol: Text(self.body, str(symbol), "int32", 0, limit - 1)
            for symbol, limit in limits.items()
        }
        self.env[x] = Text(self.body, "x", "float32")

    def value(self, formula: sympy.Basic) -> Any:
        """A formula's value: text, or a Python number."""
        for load in _inner_first(formula):
            if load not in self.env:
                self.env[load] = self.load(load)
        return self._evaluate(self._gathered(formula))

    def _evaluate(self, formula: sympy.Basic) -> Any:
        return evaluate(formula, self.env, dtype=torch.float32)

    def _gathered(self, formula: sympy.Basic) -> sympy.Basic:
        """The formula with products' factors that are the same for a row or a tile in one.

        Those are then computed once, and not for each element.
        """
        if isinstance(formula, (Load, sympy.logic.boolalg.Boolean)) or not formula.has(Load):
            return formula
        args = [self._gathered(arg) for arg in formula.args]
        if isinstance(formula, sympy.Mul):
            alike: dict[frozenset[sympy.Symbol], list[sympy.Expr]] = {}
            for arg in args:
                alike.setdefault(frozenset(arg.free_symbols & {t, s, x}), []).append(arg)
            few = [part for key, part in alike.items() if len(key) < 2 and len(part) > 1]
            if len(alike) > 1:
                for part in few:
                    product = sympy.Mul(*part)
                    one = sympy.Dummy("part", real=True)
                    self.env[one] = Source(self._evaluate(product), torch.float32, ())
                    args = [arg for arg in args if arg not in part] + [one]
        return formula.func(*args)

    def load(self, load: Load) -> Source:
        """Reads an element."""
        number = int(load.args[0])
        kind = self.wanted.kinds[number]
        code = self.body.name(f"tl.load(operands[{number}]{self.offset(load)})")
        if kind.value == "bool":
            return Source(self.body.value(f"{code} != 0", "int1"), torch.bool, ())
        if kind.value == "float":
            value = self.body.value(f"{code}.to(tl.float32)", "float32")
            return Source(value, torch.float32, ())
        low, high = {"uint8": (0, 255), "int32": (-(2**31), 2**31), "int64": (-(2**63), 2**63)}[
            kind.value
        ]
        if kind.value == "int64":
            return Source(Text(self.body, code, "int64", low, high), torch.int64, ())
        value = self.body.value(f"{code}.to(tl.int32)", "int32", low, high)
        return Source(value, torch.int64, ())

    def offset(self, load: Load, places: str = "places") -> str:
        """Where in its operand a load reads, as a text to add to the pointer.

        A position outside, which a row past the end or a branch not taken may have, reads some
        other element.
        """
        number = int(load.args[0])
        first = sum(2 * kind.rank for kind in self.wanted.kinds[:number])
        terms = []
        for axis, position in enumerate(load.args[1:]):
            stride = f"{places}[{first + 2 * axis}]"
            size = f"{places}[{first + 2 * axis + 1}]"
            value = self.value(position)
            if isinstance(value, int):
                if value:
                    terms.append(f"{value if value > 0 else f'({size} - {-value})'} * {stride}")
                continue
            terms.append(f"{self._inside(value, size, number)} * {stride}")
        return "".join(f" + {term}" for term in terms)

    def _inside(self, value: Text, size: str, number: int) -> str:
        value = value if not value.is_float else value.to(torch.int64)
        code = value.code
        if value.low < 0:
            code = self.body.name(f"tl.where({code} < 0, {code} + {size}, {code})")
            code = self.body.name(f"tl.maximum({code}, 0)")
        code = self.body.name(f"tl.minimum({code}, {size} - 1)")
        return code if self.wanted.kinds[number].is_near else f"{code}.to(tl.int64)"


def _inner_first(formula: sympy.Basic) -> list[Load]:
    """The loads of a formula, those in the positions of others before them."""
    loads = sorted(formula.atoms(Load), key=sympy.default_sort_key)
    return sorted(loads, key=lambda load: len(load.atoms(Load)))


def _keep_text(wanted: Request) -> str:
    """The text of the predicate."""
    scope = _Scope(wanted)
    value = scope.value(parsed(wanted.program).keep)
    last = f"return {_truth(value)}"
    return _define("keep", "b, h, t, s, operands, places", scope.body, last)


def _score_text(wanted: Request, formulas: Sequence[sympy.Expr]) -> str:
    scope = _Scope(wanted)
    values = [_number(scope.body, scope.value(formula)) for formula in formulas]
    last = f"return {', '.join(values)}"
    return _define("logit", "x, b, h, t, s, operands, places", scope.body, last)


def _sink_text(wanted: Request) -> str:
    scope = _Scope(wanted)
    value = scope.value(sympy.Float(LOG2_E) * parsed(wanted.program).sink)
    last = f"return {_number(scope.body, value)}"
    return _define("sink", "b, h, t, operands, places", scope.body, last)


def _scattered(wanted: Request) -> list[tuple[Load, sympy.Expr]]:
    """The reads of operands whose gradients are wanted, and the slopes of the score there."""
    found = [slopes_of(wanted.program, number) for number in wanted.wanted]
    return [(part.load, part.slope) for parts in found for part in parts if part.name == "score"]


def _scatter_text(wanted: Request) -> str:
    """Adds a tile's share to the gradients of the operands.

    `grads` are float32 tensors, one for each wanted operand, with the strides of `grad_places`.
    Elements that a whole row, column or tile shares are added up before.
    """
    scope, program = _Scope(wanted), parsed(wanted.program)
    scale = sympy.Float(program.scale)
    for load, slope in _scattered(wanted):
        share = scope.value(slope.xreplace({x: scale * x}))
        code = share.code if isinstance(share, Text) else repr(float(share))
        code = scope.body.name(f"tl.where(live, upstream * {code}, 0.0)")
        offset = scope.offset(load, "grad_places")
        symbols = {symbol for position in load.args[1:] for symbol in position.free_symbols}
        if t not in symbols:
            code = scope.body.name(f"tl.sum({code}, 0, keep_dims=True)")
        if s not in symbols:
            code = scope.body.name(f"tl.sum({code}, 1, keep_dims=True)")
        number = wanted.wanted.index(int(load.args[0]))
        to = f"grads[{number}]{offset} + tl.zeros_like({code}).to(tl.int32)"
        scope.body.lines.append(f"tl.atomic_add({to}, {code}, sem='relaxed')")
    parameters = "upstream, live, x, b, h, t, s, operands, places, grads, grad_places"
    return _define("scatter", parameters, scope.body, "return")


class Ends(NamedTuple):
    """What is known of the loads of a predicate: their extrema over blocks, as arguments."""

    loads: tuple[Load, ...]
    is_whole: tuple[bool, ...]


@functools.lru_cache(maxsize=1024)
def possible(predicate: str, ends: Ends) -> Any:
    """A device function: what a predicate can be in blocks of queries and keys.

    Its arguments are `(b, h, t_low, t_high, s_low, s_high, lows, highs)`, with the extrema of
    `ends.loads` in the last two; it returns whether the predicate may hold, and whether it must.
    """
    body = Body()
    intervals: dict[sympy.Basic, Any] = {}
    for symbol, limit in _INDEX_LIMITS.items():
        names = [f"{symbol}_low", f"{symbol}_high"] if symbol in (t, s) else [str(symbol)] * 2
        low, high = (Text(body, name, "int32", 0, limit - 1) for name in names)
        intervals[symbol] = (low, low if symbol in (b, h) else high)
    for number, (load, is_whole) in enumerate(zip(ends.loads, ends.is_whole, strict=True)):
        low, high = (Text(body, f"{name}[{number}]", "float64") for name in ("lows", "highs"))
        intervals[load] = Interval(low, high, True, is_whole, is_finite=is_whole)
    some, every = bounds(parsed(predicate).keep, intervals)
    last = f"return {_truth(some)}, {_truth(every)}"
    parameters = "b, h, t_low, t_high, s_low, s_high, lows, highs"
    return make(_define("possible", parameters, body, last), "possible")
