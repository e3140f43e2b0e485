"""How long selected attention takes in each loop order, and dense attention.

A stage of `sparse_compile.cost_formulas` takes as long as the slowest of its parts does at the
rate that was measured on the device:

    FLOPs / products per second          rows padded to what the matrix unit takes
    bytes / copy rate                    from memory, each once
    bytes / re-read rate(footprint)      from the L2 cache, as far as the footprint lets it
    bytes / atomics rate(footprint)      float32 additions
    bytes / rate of one program          the longest chain of reads that one program makes

divided by its efficiency, the share of that roof that it was seen to reach. Launching takes the
host a time of its own; whichever is longer, host or device, is the prediction. In words, for
example: "kv_major: 3.1 ms predicted, query_major 18, dense 14".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import sympy

from sparse_compile.cost_formulas import (
    BACKWARD,
    DENSE,
    DENSE_BACKWARD,
    FORCED,
    LOOP_ORDERS,
    SYMBOLS,
    TILE_SHARED,
    TILE_TOKENS,
    cost,
    padded_size,
)
from sparse_compile.rates import Device, at_footprint

ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


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
        # queries before the first key read nothing
        n_queries = min(self.n_queries, self.n_keys) if self.causal else self.n_queries
        return (
            self.batch, n_queries, self.n_keys, self.query_heads, self.kv_heads,
            self.head_dim, value_dim, self.n_slots, self.block_size, ITEMSIZES[self.dtype],
            overlap.shared, overlap.left,
        )  # fmt: skip


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
        ms[name] = 1e3 * part_s(name, values, device, problem)
        if problem.backward:
            ms[name] += 1e3 * part_s(backward_of(name), values, device, problem)
    return Prediction(ms=ms, note=device.note)


def backward_of(name: str) -> str:
    """The part that computes the gradients: one for all loop orders, one for dense attention."""
    return DENSE_BACKWARD if name == DENSE else BACKWARD


def part_s(name: str, values: tuple[float, ...], device: Device, problem: Problem) -> float:
    """Seconds of a part: of the host or of the device, whichever takes longer.

    Args:
        name: One of `PARTS`.
        values: Those of `problem`.
        device: As for `predict`.
        problem: For its dtype and whether it is causal.
    """
    shares = device.efficiency.stages
    stages, launches = evaluate(name, values, causal=problem.causal)
    work = 0.0
    for stage, numbers in stages.items():
        work += roof_s(numbers, device, problem.dtype) / shares.get(stage, 1.0)
    host = launches * device.rates.launch_s / shares.get(f"{name}.launch", 1.0)
    return max(work, host)


def evaluate(
    name: str, values: tuple[float, ...], *, causal: bool
) -> tuple[dict[str, tuple[float, ...]], float]:
    """The numbers of every stage of a part, `"kv_major.attend"` -> in the order of
    `Stage.expressions`; and the number of launches."""
    stages, function = _compiled(name, causal)
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
    first = max(0.0, problem.n_keys - problem.n_queries)
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


@functools.lru_cache(maxsize=64)
def _compiled(name: str, causal: bool) -> tuple[tuple[str, ...], Callable[..., Any]]:
    found = cost(name, causal=causal)
    numbers = [stage.expressions() for stage in found.stages]
    function = sympy.lambdify(
        SYMBOLS, [*numbers, found.launches], modules=[{"padded": padded_size}, "math"], cse=True
    )
    return tuple(stage.name for stage in found.stages), function


def short_ms(ms: float) -> str:
    """Two significant digits, never with an exponent."""
    return f"{ms:.0f}" if ms >= 9.95 else f"{ms:.1f}" if ms >= 0.95 else f"{ms:.2g}"
