"""What a buffer holds, recognised by its values: a constant, a ramp, a band.

A recognised formula is checked against every element that can be read, so it is a proof as long as
the buffer does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy
import torch

from sparse_compile.expressions import Where
from sparse_compile.passes.logic import choose, exact_float

MAX_ELEMENTS = 2**25  # of the part that is read; checking that many takes some 50 ms

Formula = Callable[[tuple[sympy.Expr, ...]], sympy.Basic]


@dataclass(frozen=True)
class BufferValue:
    """A formula that holds for the first `sizes` elements of each dimension; None: none found."""

    formula: Formula | None
    sizes: tuple[int, ...]

    def covers(self, sizes: Sequence[int]) -> bool:
        """True if nothing more can be learnt for a part of these sizes."""
        if self.formula is None:
            return all(want >= have for want, have in zip(sizes, self.sizes, strict=True))
        return all(want <= have for want, have in zip(sizes, self.sizes, strict=True))


def recognise(tensor: torch.Tensor, sizes: Sequence[int]) -> BufferValue:
    """Look at the leading part of a buffer and say what it holds.

    Args:
        tensor: The buffer's real contents.
        sizes: How much of each dimension can be read.
    """
    sizes = tuple(sizes)
    unknown = BufferValue(None, sizes)
    if type(tensor) is not torch.Tensor:  # fakes and subclasses have no contents to look at
        return unknown
    if tensor.requires_grad or tensor.dtype.is_complex or tensor.is_quantized or 0 in sizes:
        return unknown
    with torch.no_grad():
        part = tensor.detach()[tuple(slice(0, size) for size in sizes)]
        dims = _varying(part)
        if dims is None:
            return unknown
        core = part[tuple(slice(None) if d in dims else 0 for d in range(part.ndim))]
        found = _core_formula(core)
        if found is None or not torch.equal(part, _broadcast(core, part, dims)):
            return unknown
    boolean = tensor.dtype == torch.bool

    def formula(index: tuple[sympy.Expr, ...]) -> sympy.Basic:
        value = found(tuple(index[dim] for dim in dims))
        return _as_boolean(value) if boolean else value

    return BufferValue(formula, sizes)


def _varying(part: torch.Tensor) -> list[int] | None:
    """The dimensions along which a few sampled lines vary; None for more than two or too much."""
    if part.numel() > MAX_ELEMENTS:
        return None
    dims = []
    for dim, size in enumerate(part.shape):
        if size == 1:
            continue
        lines = part.movedim(dim, -1)
        samples = [lines[tuple(n * k // 2 for n in _last(lines.shape[:-1]))] for k in range(3)]
        if any(bool((line != line[0]).any()) for line in samples):
            dims.append(dim)
    return dims if len(dims) <= 2 else None


def _last(shape: Sequence[int]) -> list[int]:
    return [size - 1 for size in shape]


def _broadcast(core: torch.Tensor, part: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    view = core.reshape([size if d in dims else 1 for d, size in enumerate(part.shape)])
    return view.expand(part.shape)


def _core_formula(core: torch.Tensor) -> Formula | None:
    if core.ndim == 0:
        value = _number(core)
        return None if value is None else lambda index: value
    if core.ndim == 1:
        return _line(core)
    return _plane(core)


def _number(value: torch.Tensor) -> sympy.Expr | None:
    number = value.item()
    if number != number:
        return None
    return exact_float(number) if isinstance(number, float) else sympy.Integer(int(number))


def _line(core: torch.Tensor) -> Formula | None:
    """A ramp, or two values that change at most twice."""
    ramp = _ramp(core)
    if ramp is not None:
        start, step = ramp
        return lambda index: start + step * index[0]
    steps = _runs(core)
    if steps is None:
        return None
    return lambda index: _banded(index[0], 0, steps)


def _ramp(core: torch.Tensor) -> tuple[sympy.Expr, sympy.Expr] | None:
    if core.dtype == torch.bool or len(core) < 2:
        return None
    start, following = _number(core[0]), _number(core[1])
    if start is None or following is None or not (start.is_Integer and following.is_Integer):
        return None
    step = following - start
    if max(abs(start), abs(step)) * len(core) > 2**52:
        return None  # doubles would not tell such numbers apart
    positions = torch.arange(len(core), dtype=torch.float64, device=core.device)
    if not torch.equal(positions * int(step) + int(start), core.double()):
        return None
    return start, step


_Runs = tuple[list[int], list[sympy.Expr]]


def _runs(line: torch.Tensor) -> _Runs | None:
    """Where a line of at most two values changes, and the values; None for anything else."""
    changes = torch.nonzero(line[1:] != line[:-1]).flatten()
    if len(changes) > 2:
        return None
    places = [int(change) + 1 for change in changes]
    values = [_number(line[start]) for start in (0, *places)]
    if None in values or (len(values) == 3 and values[0] != values[2]):
        return None
    return places, values


def _banded(position: sympy.Expr, origin: int, runs: _Runs) -> sympy.Basic:
    """The value at `position` of a line whose element `origin` is at position 0."""
    places, values = runs
    if not places:
        return values[0]
    inside = sympy.Ge(position, places[0] - origin)
    if len(places) == 1:
        inside, values = sympy.Le(position, places[0] - origin - 1), values[::-1]
    else:
        inside = sympy.And(inside, sympy.Le(position, places[1] - origin - 1))
    return Where(inside, values[1], values[0])


def _plane(core: torch.Tensor) -> Formula | None:
    """A function of (column - row): a ramp, or two values that change at most twice."""
    rows = core.shape[0]
    line = torch.cat([core[:, 0].flip(0), core[0, 1:]])  # [rows - 1 + k] is the value at diagonal k
    ramp, runs = _ramp(line), _runs(line)
    if (ramp is None and runs is None) or not torch.equal(core[1:, 1:], core[:-1, :-1]):
        return None
    origin = rows - 1
    if ramp is not None:
        start, step = ramp
        return lambda index: start + step * (index[1] - index[0] + origin)
    return lambda index: _banded(index[1] - index[0], origin, runs)


def _as_boolean(value: sympy.Basic) -> sympy.Basic:
    """A formula over 0 and 1 as a Boolean."""
    if isinstance(value, Where):
        return choose(value.args[0], sympy.Ne(value.args[1], 0), sympy.Ne(value.args[2], 0))
    return sympy.Ne(value, 0)
