"""Names for the conjuncts of a mask predicate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import sympy
from sympy.printing.str import StrPrinter

from sparse_compile.expressions import Load, s, t
from sparse_compile.ir import AtomKind, MaskAtom
from sparse_compile.passes.predicates import halfspace, normalise

if TYPE_CHECKING:
    from sparse_compile.passes import bounds

_ORDER = get_args(AtomKind)


def classify(
    predicate: sympy.Basic, ranges: bounds.Ranges, names: Sequence[str] = ()
) -> tuple[MaskAtom, ...]:
    """The predicate's conjuncts, each with its kind and a readable text; none if it always holds.

    Args:
        predicate: A Boolean over indices, loads and sizes.
        ranges: The sizes of the index symbols, as for `normalise`.
        names: Names of the operands that `Load` counts, for the texts.
    """
    parts = list(sympy.And.make_args(normalise(predicate, ranges)))
    atoms = _bands(parts, ranges)
    atoms += [_atom(part, ranges, names) for part in parts if part is not sympy.true]
    return tuple(sorted(atoms, key=lambda atom: (_ORDER.index(atom.kind), atom.text)))


def _bands(parts: list[sympy.Basic], ranges: bounds.Ranges) -> list[MaskAtom]:
    """Windows that reach to both sides: takes their two halves out of `parts`."""
    spaces = {space.form: (space.bound, part) for part in parts if (space := halfspace(part))}
    if t - s not in spaces or s - t not in spaces:
        return []
    (left, below), (right, above) = spaces[t - s], spaces[s - t]
    shift = ranges[s] - ranges[t] if s in ranges and t in ranges else None
    if not (right.is_Integer and right > 0) or right == shift or not left.is_Integer:
        return []
    parts.remove(below)
    parts.remove(above)
    both = sympy.And(below, above)
    if left == right:
        return [_named("symmetric_window", both, f"symmetric_window({left})")]
    return [_named("window", both, f"window(left={left + 1}, right={right})")]


def _named(kind: AtomKind, predicate: sympy.Basic, text: str) -> MaskAtom:
    return MaskAtom(kind=kind, predicate=predicate, text=text)


def _atom(part: sympy.Basic, ranges: bounds.Ranges, names: Sequence[str]) -> MaskAtom:
    found = _loaded(part, names) if part.has(Load) else _structural(part, ranges)
    if found is not None:
        return found
    kind = "data" if part.has(Load) else "structural"
    return _named(kind, part, f"{kind}({readable(part, names)})")


def _structural(part: sympy.Basic, ranges: bounds.Ranges) -> MaskAtom | None:
    space = halfspace(part)
    if space is not None:
        return _half(part, space.form, space.bound)
    if isinstance(part, sympy.Eq):
        return _equality(part)
    if isinstance(part, sympy.Or):
        return _prefix(part)
    return None


def _half(part: sympy.Basic, form: sympy.Expr, bound: sympy.Expr) -> MaskAtom | None:
    if form == s - t:
        return _named("causal", part, "causal" if bound == 0 else f"causal(offset={bound})")
    if form == t - s:
        return _named("window", part, f"window(left={bound + 1})")
    if form == s:
        return _named("kv_length", part, f"kv_length({bound + 1})")
    if form in (sympy.Abs(t - s), sympy.Abs(s - t)):
        return _named("symmetric_window", part, f"symmetric_window({bound})")
    return None


def _equality(part: sympy.Eq) -> MaskAtom | None:
    """chunk, dilated, block_diagonal: something of the query equals something of the key."""
    left, right = part.args
    if isinstance(right, sympy.Mod) and left == 0:
        left, right = right, left
    if isinstance(left, sympy.Mod):
        value, step = left.args
        apart = right == 0 and _is_distance(value, step)
        same = (
            isinstance(right, sympy.Mod)
            and right.args[1] == step
            and {value, right.args[0]} == {s, t}
        )
        return _named("dilated", part, f"dilated({step})") if apart or same else None
    query, key = (left, right) if left.has(t) else (right, left)
    if query.has(s) or key.has(t) or not (query.has(t) and key.has(s)):
        return None
    if query.xreplace({t: s}) == key and isinstance(key, sympy.floor):
        chunk = _chunk(key.args[0])
        if chunk is not None:
            size, offset = chunk
            shift = "" if offset == 0 else f", offset={offset}"
            return _named("chunk", part, f"chunk({size}{shift})")
    return _named("block_diagonal", part, f"block_diagonal({query} = {key})")


def _is_distance(value: sympy.Expr, step: sympy.Expr) -> bool:
    """True if `value` is t - s or s - t, modulo `step`."""
    coefficients = [sympy.expand(value).coeff(symbol) for symbol in (t, s)]
    if sympy.expand(value - coefficients[0] * t - coefficients[1] * s) != 0:
        return False
    return any(
        all(sympy.Mod(c - wanted, step) == 0 for c, wanted in zip(coefficients, pair, strict=True))
        for pair in ((1, -1), (-1, 1))
    )


def _chunk(inside: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """(size, offset) of `(s + offset) / size`."""
    rate = sympy.expand(inside).coeff(s)
    if rate == 0 or (1 / rate).free_symbols & {s, t}:
        return None
    size = 1 / rate
    return size, sympy.expand((inside - rate * s) * size)


def _prefix(part: sympy.Or) -> MaskAtom | None:
    """Keys below a fixed number, or keys not after the query."""
    spaces = {space.form: space.bound for one in part.args if (space := halfspace(one))}
    if len(part.args) != 2 or spaces.keys() != {s, s - t}:
        return None
    offset = spaces[s - t]
    shift = "" if offset == 0 else f", offset={offset}"
    return _named("prefix", part, f"prefix({spaces[s] + 1}{shift})")


def _loaded(part: sympy.Basic, names: Sequence[str]) -> MaskAtom | None:
    used = part.free_symbols & {s, t}
    sources = ", ".join(dict.fromkeys(_name(load, names) for load in _outer_loads(part)))
    limit = _key_limit(part)
    if limit is not None:
        return _named("kv_length", part, f"kv_length({readable(limit, names)})")
    if used == {s}:
        return _named("key_padding", part, f"key_padding({sources})")
    if used == {t}:
        return _named("query_padding", part, f"query_padding({sources})")
    if isinstance(part, sympy.Eq):
        left, right = part.args
        sides = [side.free_symbols & {s, t} for side in (left, right)]
        if sides in ([{t}, {s}], [{s}, {t}]) and left.has(Load) and right.has(Load):
            return _document(part, sources)
    return None


def _document(part: sympy.Eq, sources: str) -> MaskAtom | None:
    """Ids that are loaded for the query and for the key; a chunk with a loaded offset is no id."""
    for side in part.args:
        if not all(load.free_symbols & {s, t} for load in _outer_loads(side)):
            return None
    return _named("document", part, f"document({sources})")


def _outer_loads(part: sympy.Basic) -> list[sympy.Basic]:
    return sorted(part.atoms(Load), key=sympy.default_sort_key)


def _key_limit(part: sympy.Basic) -> sympy.Expr | None:
    """n, if the part says `s < n` (or `s <= n - 1`) and n does not depend on s."""
    if not isinstance(part, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return None
    below, above = part.lts, part.gts
    rest = sympy.expand(below - above - s)
    if rest.has(s):
        return None
    strict = isinstance(part, (sympy.Lt, sympy.Gt))
    return -rest if strict else 1 - rest


def _name(load: sympy.Basic, names: Sequence[str]) -> str:
    number = int(load.args[0])
    return names[number] if number < len(names) else f"operand{number}"


def readable(expr: sympy.Basic, names: Sequence[str] = ()) -> str:
    """An expression with loads written as `name[indices]`."""
    return _Printer(names).doprint(expr)


class _Printer(StrPrinter):
    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names

    def _print_Load(self, load: sympy.Basic) -> str:
        name, indices = _name(load, self._names), load.args[1:]
        return f"{name}[{self.stringify(indices, ', ')}]" if indices else name
