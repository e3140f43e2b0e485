"""How long selected attention takes in each loop order, and dense attention: a model in symbols.

A loop order is a row of stages, one after the other. A stage moves bytes and multiplies matrices;
it takes as long as the slowest of its parts does at the device's measured rate:

    FLOPs / products per second          rows padded to what the matrix unit takes
    bytes / copy rate                    from memory, each once
    bytes / re-read rate(footprint)      from the L2 cache, as far as the footprint lets it
    bytes / atomics rate(footprint)      float32 additions
    bytes / rate of one program          the longest chain of reads that one program makes

divided by its efficiency, the share of that roof that it was seen to reach. Launching takes the
host a time of its own; whichever is longer, host or device, is the prediction.

    >>> print(predict(Problem(n_queries=32768, n_keys=32768, query_heads=32, kv_heads=8), device))
    kv_major: 5.6 ms predicted, query_major 18, dense 14

The selection is assumed to hold the first KV block and a token's last two, as NSA's does, and
neighbours to agree on nothing else; `Overlap` says otherwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import sympy

from sparse_compile.rates import Device, at_footprint

B, T, S, Hq, Hkv, D, Dv, K, N = sympy.symbols("B T S Hq Hkv D Dv K N", positive=True)
e = sympy.Symbol("e", positive=True)  # bytes of a number
U = sympy.Symbol("U", nonnegative=True)  # KV blocks that a tile of neighbours reads itself
R = sympy.Symbol("R", nonnegative=True)  # selections of a token that its tile leaves
SYMBOLS = (B, T, S, Hq, Hkv, D, Dv, K, N, e, U, R)
G = Hq / Hkv

LOOP_ORDERS = ("query_major", "kv_major", "tile_union")
DENSE = "dense"
TILE_TOKENS = 64  # neighbours of a tile of `tile_union`
TILE_SHARED = 16  # of them must have selected a KV block for the tile to read it
SCRATCH_BYTES = 36 * 2**20  # of partial outputs of `kv_major`
ROWS_PER_LIST = 192  # for which that scratch grows if it must
BACKWARD_BYTES = 240 * 2**20  # of partial gradients of queries
ITEM_ROWS = 512  # rows that a program of `kv_major` takes to a KV block
FORCED = 3  # KV blocks that every token is assumed to select: first, own, previous


def least(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """The smaller one; not simplified, which would take sympy a second for all formulas."""
    return sympy.Min(a, b, evaluate=False)


def most(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """The larger one; not simplified."""
    return sympy.Max(a, b, evaluate=False)


class padded(sympy.Function):
    """The next power of two, at least 16: what the matrix unit and a tile's width take."""

    @classmethod
    def eval(cls, size: sympy.Expr) -> sympy.Expr | None:
        """A number, if `size` is one."""
        return sympy.Integer(_padded(float(size))) if size.is_number else None


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What one step of a loop order moves and multiplies, as expressions of the problem."""

    name: str
    flops: sympy.Expr = sympy.S.Zero
    copied: sympy.Expr = sympy.S.Zero  # bytes from and to memory
    reread: sympy.Expr = sympy.S.Zero  # bytes from and to the L2 cache ...
    footprint: sympy.Expr = sympy.S.One  # ... and what of it is alive at a time
    atomics: sympy.Expr = sympy.S.Zero  # bytes of float32 additions ...
    atomics_footprint: sympy.Expr = sympy.S.One
    chain: sympy.Expr = sympy.S.Zero  # bytes that one program reads at least, one after the other

    def expressions(self) -> tuple[sympy.Expr, ...]:
        """All of them, in the order in which `Cost.seconds` takes their values."""
        return (
            self.flops, self.copied, self.reread, self.footprint, self.atomics,
            self.atomics_footprint, self.chain,
        )  # fmt: skip


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """A loop order: its stages and how often the host launches something."""

    stages: tuple[Stage, ...]
    launches: sympy.Expr

    def __add__(self, other: Cost) -> Cost:
        return Cost(stages=self.stages + other.stages, launches=self.launches + other.launches)


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """How much neighbouring tokens agree: what `tile_union` gains from."""

    shared: float  # KV blocks that 16 or more tokens of a tile of 64 selected
    left: float  # selections of a token among all others


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One call of selected attention. Sizes are whole numbers, or real ones where it is solved."""

    batch: float = 1
    n_queries: float
    n_keys: float
    query_heads: float
    kv_heads: float
    head_dim: float = 128
    value_dim: float | None = None  # head_dim
    n_slots: float = 16
    block_size: float = 64
    dtype: str = "bfloat16"
    causal: bool = True
    backward: bool = False  # whether gradients are computed too
    overlap: Overlap | None = None  # none but the first KV block and the last two

    def values(self) -> tuple[float, ...]:
        """The values of `SYMBOLS`."""
        overlap = self.overlap or assumed_overlap(self)
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        return (
            self.batch, self.n_queries, self.n_keys, self.query_heads, self.kv_heads,
            self.head_dim, value_dim, self.n_slots, self.block_size, ITEMSIZES[self.dtype],
            overlap.shared, overlap.left,
        )  # fmt: skip


ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of every loop order and of dense attention."""

    ms: dict[str, float]
    note: str = ""  # whose rates these are, where not this device's

    @property
    def fastest(self) -> str:
        """The fastest loop order; dense attention is another function, and none."""
        return min((name for name in self.ms if name != DENSE), key=self.ms.__getitem__)

    @property
    def is_dense_faster(self) -> bool:
        """Whether dense attention is faster than every loop order."""
        return self.ms.get(DENSE, math.inf) < self.ms[self.fastest]

    def __str__(self) -> str:
        """`kv_major: 3.1 ms predicted, query_major 18, dense 14`."""
        rest = sorted(set(self.ms) - {self.fastest, DENSE}, key=self.ms.__getitem__)
        rest += [DENSE] if DENSE in self.ms else []
        text = f"{self.fastest}: {short_ms(self.ms[self.fastest])} ms predicted"
        text += "".join(f", {name} {short_ms(self.ms[name])}" for name in rest)
        return text + (f" ({self.note})" if self.note else "")


def predict(
    problem: Problem, device: Device, loop_orders: Sequence[str] = LOOP_ORDERS
) -> Prediction:
    """How long a problem takes on a device.

    Args:
        problem: Sizes, dtype, and whether gradients are computed.
        device: What `sparse_compile.rates.lookup` gives.
        loop_orders: Those to look at.
    """
    values = problem.values()
    ms = {}
    for name in (*loop_orders, DENSE):
        stages, launches = evaluate(name, values, causal=problem.causal, backward=problem.backward)
        work = sum(
            roof_s(numbers, device, problem.dtype) / device.efficiency.stages.get(stage, 1.0)
            for stage, numbers in stages.items()
        )
        host = launches * device.rates.launch_s
        host /= device.efficiency.stages.get(f"{name}.launch", 1.0)
        ms[name] = 1e3 * max(work, host)
    return Prediction(ms=ms, note=device.note)


def evaluate(
    name: str, values: tuple[float, ...], *, causal: bool, backward: bool
) -> tuple[dict[str, tuple[float, ...]], float]:
    """The numbers of every stage, `"kv_major.attend"` -> in the order of `Stage.expressions`; and
    the number of launches."""
    stages, function = _compiled(name, causal, backward)
    *numbers, launches = function(*values)
    return dict(zip(stages, numbers, strict=True)), launches


def roof_s(numbers: tuple[float, ...], device: Device, dtype: str) -> float:
    """Seconds of a stage that reaches all that the device can."""
    flops, copied, reread, footprint, atomics, atomics_footprint, chain = numbers
    rates = device.rates
    products = rates.flops_per_s.get(dtype) or min(rates.flops_per_s.values())
    found = max(
        flops / products, copied / rates.copy_bytes_per_s, chain / rates.program_bytes_per_s
    )
    if reread:
        found = max(found, reread / at_footprint(rates.reread_bytes_per_s, footprint))
    if atomics:
        found = max(found, atomics / at_footprint(rates.atomic_bytes_per_s, atomics_footprint))
    return found


def assumed_overlap(problem: Problem) -> Overlap:
    """What neighbours share if everything but the forced KV blocks is drawn at random.

    As long as there are few KV blocks to draw from, 16 of 64 tokens meet in each of them.
    """
    slots = min(problem.n_slots, max(1.0, problem.n_keys / problem.block_size))
    if problem.n_queries < TILE_SHARED:
        return Overlap(shared=0.0, left=slots)
    drawn = slots - min(FORCED, slots) if problem.causal else slots
    crowded_to = drawn * problem.block_size * TILE_TOKENS / TILE_SHARED
    if not problem.causal:
        if problem.n_keys > crowded_to:
            return Overlap(shared=0.0, left=slots)
        return Overlap(shared=problem.n_keys / problem.block_size, left=0.0)
    first = problem.n_keys - problem.n_queries
    end = min(problem.n_keys, max(first, crowded_to))
    share = (end - first) / problem.n_queries  # of the tokens, which see few KV blocks
    seen = (first + end) / 2 / problem.block_size
    forced = max(1.0, TILE_TOKENS / problem.block_size) + 2  # of a tile
    shared = share * max(seen, forced) + (1 - share) * forced
    return Overlap(shared=shared, left=(1 - share) * drawn)


class Crossover(msgspec.Struct, frozen=True, kw_only=True):
    """Where another loop order becomes the fastest."""

    symbol: str  # "group" or "tokens"
    at: int  # the first value at which `after` is
    before: str
    after: str

    def __str__(self) -> str:
        what = "a group of" if self.symbol == "group" else "tokens ="
        return f"{self.after} from {what} {self.at} on"


def crossovers(
    problem: Problem, device: Device, symbol: str, *, loop_orders: Sequence[str] = LOOP_ORDERS,
    dense: bool = False,
) -> list[Crossover]:  # fmt: skip
    """Where the choice flips while one size varies and the others stay.

    Args:
        problem: The other sizes.
        device: As for `predict`.
        symbol: `"group"`, from 1 to 64 with the same query heads; or `"tokens"`, queries and keys
            from 64 to 2 ** 20.
        loop_orders: Those to look at.
        dense: Whether dense attention may be chosen too.
    """

    def best(value: int) -> str:
        changed = {"kv_heads": problem.query_heads / value}
        if symbol == "tokens":
            changed = {"n_queries": value, "n_keys": value}
        found = predict(msgspec.structs.replace(problem, **changed), device, loop_orders)
        return DENSE if dense and found.is_dense_faster else found.fastest

    most_heads = min(6, int(problem.query_heads).bit_length() - 1)
    low, high = (0, most_heads) if symbol == "group" else (6, 20)
    found = []
    for power in range(low, high):
        left, right = 2**power, 2 ** (power + 1)
        while best(left) != best(right):
            # the leftmost flip in between, by halves; then on from there
            begin, end = left, right
            while end - begin > 1:
                middle = (begin + end) // 2
                begin, end = (middle, end) if best(middle) == best(left) else (begin, middle)
            found.append(Crossover(symbol=symbol, at=end, before=best(begin), after=best(end)))
            left = end
    return found


def cost(name: str, *, causal: bool = True, backward: bool = False) -> Cost:
    """The stages of a loop order, or of `"dense"`, as expressions in `SYMBOLS`."""
    forward = {
        "query_major": _query_major, "kv_major": _kv_major, "tile_union": _tile_union, DENSE: _dense
    }[name](causal)  # fmt: skip
    if not backward:
        return forward
    return forward + (_dense_backward(causal) if name == DENSE else _backward(causal))


@functools.lru_cache(maxsize=64)
def _compiled(
    name: str, causal: bool, backward: bool
) -> tuple[tuple[str, ...], Callable[..., Any]]:
    found = cost(name, causal=causal, backward=backward)
    numbers = [stage.expressions() for stage in found.stages]
    function = sympy.lambdify(
        SYMBOLS, [*numbers, found.launches], modules=[{"padded": _padded}, "math"], cse=True
    )
    return tuple(stage.name for stage in found.stages), function


def _selections(causal: bool) -> sympy.Expr:
    """KV blocks that the tokens of a KV head read together: K each, fewer at the start."""
    if not causal:
        return T * least(K, S / N)
    low, high = least(K, (S - T) / N), least(K, S / N)
    missing = N * ((high - low) * (K - sympy.Rational(1, 2)) - (high**2 - low**2) / 2)
    return T * K - missing


QUERY_BYTES = B * Hq * T * (D + Dv) * e  # queries read, outputs written
KEY_BYTES = B * Hkv * S * (D + Dv) * e
HEAD_BYTES = S * (D + Dv) * e  # keys and values of one head
INDEX_BYTES = 4 * B * Hkv * T * K
WIDTH = padded(D) + padded(Dv)


def _query_major(causal: bool) -> Cost:
    blocks = B * Hkv * _selections(causal)
    block_bytes = blocks * N * (D + Dv) * e
    attend = Stage(
        name="query_major.attend",
        flops=2 * blocks * N * WIDTH * padded(G),
        copied=QUERY_BYTES + least(KEY_BYTES, block_bytes) + INDEX_BYTES,
        reread=block_bytes,
        footprint=least(HEAD_BYTES, block_bytes),
        chain=least(K, S / N) * N * (D + Dv) * e,
    )
    return Cost(stages=(attend,), launches=sympy.Integer(1))


def _kv_major(causal: bool) -> Cost:
    found = _selections(causal)
    far = most(0, found - FORCED * T) if causal else found
    lists, attend, merge = _by_lists("kv_major", far)
    if not causal:
        return Cost(stages=(lists, attend, merge), launches=sympy.Integer(16))
    near_bytes = B * Hkv * (T + TILE_TOKENS + 2 * N) * (D + Dv) * e
    near = Stage(
        name="kv_major.local",
        flops=2 * B * Hq * T * (TILE_TOKENS + 2 * N) * WIDTH,
        copied=QUERY_BYTES + least(KEY_BYTES, near_bytes) + INDEX_BYTES,
    )
    return Cost(stages=(near, lists, attend, merge), launches=sympy.Integer(17))


def _by_lists(name: str, far: sympy.Expr) -> tuple[Stage, Stage, Stage]:
    """Lists of the tokens of each KV block, partial outputs by slots, and their merge.

    Args:
        name: Of the loop order.
        far: (Token, slot) pairs of a KV head.
    """
    rows = B * Hq * far
    row = Dv * e + 4  # a partial output and its log-sum-exp
    all_of_head = G * T * K * row
    scratch = least(3 * all_of_head, most(SCRATCH_BYTES, ROWS_PER_LIST * S / N * row))
    chunks = 3 * all_of_head / scratch
    visits = B * Hkv * least(chunks * S / N, far)  # of a KV block by a chunk
    visited_bytes = visits * N * (D + Dv) * e
    lists = Stage(
        name=f"{name}.lists",
        copied=6 * INDEX_BYTES,
        atomics=B * Hkv * far * 4,
        atomics_footprint=4 * B * Hkv * chunks * S / N,
    )
    attend = Stage(
        name=f"{name}.attend",
        flops=2 * rows * N * WIDTH,
        copied=QUERY_BYTES + least(KEY_BYTES, visited_bytes),
        reread=rows * (D * e + row) + visited_bytes,
        footprint=scratch + least(HEAD_BYTES, visited_bytes),
        chain=least(ITEM_ROWS, G * far) * (D * e + row),
    )
    merge = Stage(
        name=f"{name}.merge",
        copied=2 * B * Hq * T * Dv * e + INDEX_BYTES,
        reread=rows * row,
        footprint=scratch,
    )
    return lists, attend, merge


def _tile_union(causal: bool) -> Cost:
    listing = Stage(name="tile_union.unions", copied=3 * INDEX_BYTES)
    tiles = B * Hq * most(1, T / TILE_TOKENS)
    tile_bytes = tiles / least(2, G) * U * N * (D + Dv) * e
    attend = Stage(
        name="tile_union.tiles",
        flops=2 * tiles * TILE_TOKENS * U * N * WIDTH,
        copied=QUERY_BYTES + least(KEY_BYTES, tile_bytes),
        reread=tile_bytes,
        footprint=HEAD_BYTES,
        chain=U * N * (D + Dv) * e,
    )
    rest = _by_lists("tile_union", T * R)
    return Cost(stages=(listing, attend, *rest), launches=sympy.Integer(22))


def _backward(causal: bool) -> Cost:
    """One backward for every loop order: a program owns a KV block."""
    found = _selections(causal)
    rows = B * Hq * found
    scratch = least(rows * D * e, most(BACKWARD_BYTES, 128 * S / N * D * e))
    launches = most(1, rows * D * e / BACKWARD_BYTES)
    visits = least(B * Hkv * found, most(B * Hkv, launches) * S / N)
    visits += rows / (2 * ITEM_ROWS)
    lists = Stage(
        name="backward.lists",
        copied=6 * INDEX_BYTES,
        atomics=B * Hkv * found * 4,
        atomics_footprint=4 * visits,
    )
    delta = Stage(name="backward.delta", copied=2 * B * Hq * T * Dv * e)
    attend = Stage(
        name="backward.attend",
        flops=2 * rows * N * (3 * padded(D) + 2 * padded(Dv)),
        copied=2 * QUERY_BYTES + 2 * KEY_BYTES,
        reread=rows * (2 * D + Dv) * e + visits * N * (D + Dv) * e,
        footprint=scratch,
        atomics=visits * N * (D + Dv) * 4,
        atomics_footprint=KEY_BYTES / e * 4,
        chain=least(2 * ITEM_ROWS, G * found) * (2 * D + Dv) * e,
    )
    merge = Stage(
        name="backward.merge",
        copied=B * Hq * T * D * e + INDEX_BYTES,
        reread=rows * D * e,
        footprint=scratch,
    )
    casts = Stage(name="backward.casts", copied=KEY_BYTES * (1 + 8 / e))
    return Cost(stages=(lists, delta, attend, merge, casts), launches=18 + 2 * launches)


def _seen(causal: bool) -> sympy.Expr:
    """(Query, key) pairs of one head of dense attention."""
    return T * (S - (T - 1) / 2) if causal else T * S


def _dense(causal: bool) -> Cost:
    attend = Stage(
        name="dense.attend",
        flops=2 * B * Hq * _seen(causal) * WIDTH,
        copied=QUERY_BYTES + KEY_BYTES,
    )
    return Cost(stages=(attend,), launches=sympy.Integer(1))


def _dense_backward(causal: bool) -> Cost:
    attend = Stage(
        name="dense.backward",
        flops=2 * B * Hq * _seen(causal) * (3 * padded(D) + 2 * padded(Dv)),
        copied=2 * QUERY_BYTES + 2 * KEY_BYTES,
    )
    return Cost(stages=(attend,), launches=sympy.Integer(3))


def _padded(size: float) -> int:
    return max(16, 1 << (math.ceil(size) - 1).bit_length())


def short_ms(ms: float) -> str:
    """Two significant digits, never with an exponent."""
    return f"{ms:.0f}" if ms >= 9.95 else f"{ms:.1f}" if ms >= 0.95 else f"{ms:.2g}"
