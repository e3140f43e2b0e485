"""What selected attention moves and multiplies, in each loop order: formulas in symbols.

A loop order is a row of stages, one after the other; so are the gradients, and dense attention.
`sparse_compile.costs` divides their bytes and FLOPs by what a device reaches.

The selection is assumed to hold the first KV block and a token's last two, as NSA's does. Numbers
that kernels choose by themselves (tiles, scratch) are those of their defaults.
"""

from __future__ import annotations

import math

import msgspec
import sympy

B, T, S, Hq, Hkv, D, Dv, K, N = sympy.symbols("B T S Hq Hkv D Dv K N", positive=True)
e = sympy.Symbol("e", positive=True)  # bytes of a number
U = sympy.Symbol("U", nonnegative=True)  # KV blocks that a tile of neighbours reads itself
R = sympy.Symbol("R", nonnegative=True)  # selections of a token that its tile leaves
SYMBOLS = (B, T, S, Hq, Hkv, D, Dv, K, N, e, U, R)
G = Hq / Hkv

LOOP_ORDERS = ("query_major", "kv_major", "tile_union")
DENSE = "dense"
BACKWARD = "backward"  # of every loop order
DENSE_BACKWARD = "dense_backward"
PARTS = (*LOOP_ORDERS, DENSE, BACKWARD, DENSE_BACKWARD)
TILE_TOKENS = 64  # neighbours of a tile of `tile_union`
TILE_SHARED = 16  # of them must have selected a KV block for the tile to read it
SCRATCH_BYTES = 240 * 2**20  # of partial outputs, in two halves
GRADIENT_SCRATCH_BYTES = 512 * 2**20  # of partial gradients
ROWS_PER_LIST = 128  # for which a scratch grows if it must
GRADIENT_ROWS = 1024  # of a list, in the backward
ITEM_ROWS = 512  # rows that a program of `kv_major` takes to a KV block
FILLING = 512  # programs that fill a device: with fewer, several share a token in `query_major`
FORCED = 3  # KV blocks that every token is assumed to select: first, own, previous


def least(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """The smaller one; not simplified, which would take sympy a second for all formulas."""
    return sympy.Min(a, b, evaluate=False)


def most(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """The larger one; not simplified."""
    return sympy.Max(a, b, evaluate=False)


class padded(sympy.Function):
    """The next power of two, at least a lowest one: what a matrix unit or a tile takes."""

    @classmethod
    def eval(cls, size: sympy.Expr, lowest: sympy.Expr) -> sympy.Expr | None:
        """A number, if `size` is one."""
        return sympy.Integer(padded_size(float(size), int(lowest))) if size.is_number else None


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
        """All of them, in the order in which `costs.roof_s` takes their values."""
        return (
            self.flops, self.copied, self.reread, self.footprint, self.atomics,
            self.atomics_footprint, self.chain,
        )  # fmt: skip


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """A loop order or the gradients: the stages and how often the host launches something."""

    stages: tuple[Stage, ...]
    launches: sympy.Expr


def cost(name: str, *, causal: bool = True) -> Cost:
    """The stages of one of `PARTS`, as expressions in `SYMBOLS`."""
    return {
        "query_major": _query_major,
        "kv_major": _kv_major,
        "tile_union": _tile_union,
        DENSE: _dense,
        BACKWARD: _backward,
        DENSE_BACKWARD: _dense_backward,
    }[name](causal)


def selections(causal: bool) -> sympy.Expr:
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
WIDTH = padded(D, 16) + padded(Dv, 16)


def _query_major(causal: bool) -> Cost:
    blocks = B * Hkv * selections(causal)
    block_bytes = blocks * N * (D + Dv) * e
    sharing = least(least(K, S / N), most(1, FILLING / (B * Hkv * T)))  # programs of a token
    attend = Stage(
        name="query_major.attend",
        flops=2 * blocks * N * WIDTH * padded(G, 8),  # heads are columns, which need not be 16
        copied=QUERY_BYTES + least(KEY_BYTES, block_bytes) + INDEX_BYTES,
        reread=block_bytes,
        footprint=least(HEAD_BYTES, block_bytes),
        chain=least(K, S / N) / sharing * N * (D + Dv) * e,
    )
    return Cost(stages=(attend,), launches=sympy.Integer(2))


def _kv_major(causal: bool) -> Cost:
    found = selections(causal)
    far = most(0, found - FORCED * T) if causal else found
    lists, attend, merge, launches = _by_lists("kv_major", far)
    if not causal:
        return Cost(stages=(lists, attend, merge), launches=launches)
    near_bytes = B * Hkv * (T + TILE_TOKENS + 2 * N) * (D + Dv) * e
    near = Stage(
        name="kv_major.local",
        flops=2 * B * Hq * T * (TILE_TOKENS + 2 * N) * WIDTH,
        copied=QUERY_BYTES + least(KEY_BYTES, near_bytes) + INDEX_BYTES,
    )
    return Cost(stages=(near, lists, attend, merge), launches=launches + 1)


def _by_lists(name: str, far: sympy.Expr) -> tuple[Stage, Stage, Stage, sympy.Expr]:
    """Lists of the tokens of each KV block, partial outputs by slots, their merge; launches.

    Args:
        name: Of the loop order.
        far: (Token, slot) pairs of a KV head.
    """
    rows = B * Hq * far
    row = Dv * e + 4  # a partial output and its log-sum-exp
    all_of_head = G * T * K * row
    half = most(sympy.Integer(SCRATCH_BYTES // 2), ROWS_PER_LIST * S / N * row)
    chunks = most(1, all_of_head / half)
    scratch = least(2 * half, rows * row)  # that is really written
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
    return lists, attend, merge, 16 + B * Hkv * all_of_head / half


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
    *rest, launches = _by_lists("tile_union", T * R)
    return Cost(stages=(listing, attend, *rest), launches=launches + 5)


def _backward(causal: bool) -> Cost:
    """One backward for every loop order: a program owns a KV block."""
    found = selections(causal)
    rows = B * Hq * found
    whole = most(sympy.Integer(GRADIENT_SCRATCH_BYTES), ROWS_PER_LIST * S / N * D * e)
    scratch = least(rows * D * e, whole)
    launches = most(1, rows * D * e / whole)
    visits = least(B * Hkv * found, B * Hkv * S / N + rows / GRADIENT_ROWS)
    sums = S * (D + Dv) * 4  # of a KV head
    lists = Stage(
        name="backward.lists",
        copied=6 * INDEX_BYTES,
        atomics=B * Hkv * found * 4,
        atomics_footprint=4 * visits,
    )
    delta = Stage(name="backward.delta", copied=2 * B * Hq * T * Dv * e)
    attend = Stage(
        name="backward.attend",
        flops=2 * rows * N * (3 * padded(D, 16) + 2 * padded(Dv, 16)),
        copied=2 * QUERY_BYTES + 2 * KEY_BYTES,
        reread=rows * (2 * D + Dv) * e + visits * N * (D + Dv) * e,
        footprint=scratch,
        atomics=visits * N * (D + Dv) * 4,
        atomics_footprint=sums,
        chain=least(GRADIENT_ROWS, G * found) * (2 * D + Dv) * e,
    )
    merge = Stage(
        name="backward.merge",
        copied=B * Hq * T * D * e + INDEX_BYTES,
        reread=rows * D * e,
        footprint=scratch,
    )
    casts = Stage(
        name="backward.casts", copied=KEY_BYTES, reread=2 * B * Hkv * sums, footprint=sums
    )
    return Cost(stages=(lists, delta, attend, merge, casts), launches=18 + 2 * launches)


def seen(causal: bool) -> sympy.Expr:
    """(Query, key) pairs of one head of dense attention."""
    return T * (S - (T - 1) / 2) if causal else T * S


def _dense(causal: bool) -> Cost:
    attend = Stage(
        name="dense.attend",
        flops=2 * B * Hq * seen(causal) * WIDTH,
        copied=QUERY_BYTES + KEY_BYTES,
    )
    return Cost(stages=(attend,), launches=sympy.Integer(1))


def _dense_backward(causal: bool) -> Cost:
    attend = Stage(
        name="dense_backward.attend",
        flops=2 * B * Hq * seen(causal) * (3 * padded(D, 16) + 2 * padded(Dv, 16)),
        copied=2 * QUERY_BYTES + 2 * KEY_BYTES,
    )
    return Cost(stages=(attend,), launches=sympy.Integer(3))


def padded_size(size: float, lowest: int) -> int:
    """The value of `padded`."""
    return max(lowest, 1 << (math.ceil(size) - 1).bit_length())
