"""The tiled implementation of `program_attention`, forward and backward, in PyTorch operators.

It walks tiles of query rows. A tile sees the range of keys that the predicate allows any of its
rows, so a window costs O(T * window). It runs on CUDA tensors too, without a host sync; there it is
the fallback that is right for every program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor

from sparse_compile.evaluation import evaluate, read_positions, slice_of
from sparse_compile.expressions import INDICES, Load, b, derivative, h, s, t, x
from sparse_compile.intervals import bounds, load_extrema
from sparse_compile.ir import ScoreProgram

BLOCK = 128  # queries and keys per block, where key ranges are cut
TILE_NUMBERS = 1 << 21  # scores of a tile: 8 MB of float32, which stay in a last-level cache


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> ScoreProgram:
    """The program that a string encodes."""
    return ScoreProgram.decode(text)


class _Part(NamedTuple):
    """How one `Load` of a program's formula changes it."""

    name: str  # "score", "weight" or "sink"
    load: Load
    slope: sympy.Expr


@functools.lru_cache(maxsize=4096)
def slopes_of(text: str, operand: int) -> tuple[_Part, ...]:
    """The derivative of each formula with respect to each distinct read of an operand."""
    program = parsed(text)
    parts = []
    for name in ("score", "weight", "sink"):
        formula = getattr(program, name)
        loads = sorted(formula.atoms(Load), key=sympy.default_sort_key) if formula else ()
        for load in loads:
            slope = derivative(formula, load) if load.args[0] == operand else sympy.Integer(0)
            if slope != 0:
                parts.append(_Part(name, load, slope))
    return tuple(parts)


@functools.lru_cache(maxsize=4096)
def _score_slope(text: str) -> sympy.Expr:
    return derivative(parsed(text).score, x)


class _Tile(NamedTuple):
    """Query rows `start:stop`; keys `first:last`; `masked` are those that may not all be kept."""

    start: int
    stop: int
    first: int
    last: int
    masked: tuple[int, int]


class _Problem:
    """One call's arguments, in the dtype of the arithmetic."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: Sequence[Tensor],
        text: str,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        self.text, self.program = text, parsed(text)
        self.acc = torch.promote_types(q.dtype, torch.float32)
        self.batch, self.heads, self.rows, _ = q.shape
        self.kv_heads, self.keys = k.shape[1], k.shape[2]
        self.q = q.to(self.acc) * self.program.scale
        self.k, self.v = k.to(self.acc), v.to(self.acc)
        self.operands = list(operands)
        self.dropout_p, self.seed = dropout_p, seed
        self.sizes = dict(zip(INDICES, (*q.shape[:3], k.shape[2]), strict=True))
        self.indices = {
            symbol: torch.arange(size, device=q.device).view(
                [-1 if i == axis else 1 for i in range(4)]
            )
            for axis, (symbol, size) in enumerate(self.sizes.items())
        }
        empty_rows = "zero" if self.program.sink is not None else self.program.empty_rows
        filled = {"zero": 0.0, "uniform": 1 / max(1, self.keys), "nan": math.nan}
        self.empty_weight = filled[empty_rows]  # of every key, in a row that keeps none
        self.is_weighted = self.program.weight is not None or dropout_p > 0

    def grouped(self, value: Tensor) -> Tensor:
        """[B, Hq, r, n] -> [B, Hkv, G * r, n]: rows that share their keys, together."""
        return value.reshape(self.batch, self.kv_heads, -1, value.shape[-1])

    def by_head(self, value: Tensor) -> Tensor:
        """The inverse of `grouped`."""
        return value.reshape(self.batch, self.heads, -1, value.shape[-1])

    def tiles(self) -> Iterator[_Tile]:
        """Tiles that cover all rows, in order."""
        for block, (first, last, *masked) in enumerate(self._ranges()):
            stop = min((block + 1) * BLOCK, self.rows)
            step = max(16, TILE_NUMBERS // max(1, self.batch * self.heads * (last - first)))
            for start in range(block * BLOCK, stop, step):
                yield _Tile(start, min(start + step, stop), first, last, (masked[0], masked[1]))

    def _ranges(self) -> list[list[int]]:
        """For each block of rows: first key read and end, first key to check and end."""
        n_rows, n_keys = -(-self.rows // BLOCK), -(-self.keys // BLOCK)
        keep = self.program.keep
        if keep is sympy.true or n_rows * n_keys <= 1:
            return [[0, self.keys, 0, 0 if keep is sympy.true else self.keys]] * n_rows
        shape = (self.batch, self.heads, n_rows, n_keys)
        some, every = (torch.as_tensor(value).expand(shape) for value in self._keep_bounds(keep))
        if self.empty_weight != 0 and self.is_weighted:
            some = torch.ones_like(some)  # a row that keeps no key reads them all
        first, last = _span(some.flatten(0, 1).any(0))
        last = torch.maximum(last, first + 1)  # an empty row drops the keys of some block
        number = torch.arange(n_keys)
        inside = (number >= first[:, None]) & (number < last[:, None])
        ends = [first, last, *_span(~(every & some).flatten(0, 1).all(0) & inside)]
        return (torch.stack(ends, 1) * BLOCK).clamp(max=self.keys).tolist()

    def _keep_bounds(self, keep: sympy.Basic) -> tuple[Any, Any]:
        """Whether each block of the scores is possibly and certainly kept."""
        intervals: dict[sympy.Basic, tuple[Any, Any]] = {}
        blocks = {}
        for axis, (symbol, size) in enumerate(self.sizes.items()):
            block = BLOCK if symbol in (t, s) else 1
            low = torch.arange(0, size, block).view(-1, *[1] * (3 - axis))
            intervals[symbol] = (low, (low + block - 1).clamp(max=size - 1))
            blocks[symbol] = (size, block, -(-size // block))
        if self.q.device.type == "cpu":  # elsewhere, looking at values would be a host sync
            for load in keep.atoms(Load):
                operand = self.operands[int(load.args[0])]
                extrema = load_extrema(operand, load, blocks, self.sizes, torch.arange)
                if extrema is not None:
                    intervals[load] = extrema
        return bounds(keep, intervals)

    def ranges(self, tile: _Tile, keys: tuple[int, int]) -> dict[sympy.Symbol, tuple[int, int]]:
        """Where the index symbols run in a tile."""
        whole = {b: (0, self.batch), h: (0, self.heads)}
        return {**whole, t: (tile.start, tile.stop), s: keys}

    def _env(
        self, formula: sympy.Basic, tile: _Tile, keys: tuple[int, int], scores: Tensor | None
    ) -> dict[sympy.Basic, Any]:
        """Values of the symbols of a formula, and of its reads that are slices."""
        ranges = self.ranges(tile, keys)
        env: dict[sympy.Basic, Any] = {
            symbol: self.indices[symbol].narrow(axis, *_from_length(ranges[symbol]))
            for axis, symbol in enumerate(INDICES)
            if symbol in formula.free_symbols
        }
        for load in formula.atoms(Load):
            part = slice_of(self.operands[int(load.args[0])], load, ranges, self.sizes)
            if part is not None:
                env[load] = part
        if scores is not None:
            env[x] = scores
        return env

    def value(
        self,
        formula: sympy.Basic,
        tile: _Tile,
        keys: tuple[int, int] | None = None,
        scores: Tensor | None = None,
    ) -> Any:
        """A formula's value over a tile, broadcastable to [B, Hq, rows, keys]."""
        env = self._env(formula, tile, keys or (tile.first, tile.last), scores)
        return evaluate(formula, env, self.operands, dtype=self.acc)

    def logits(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """The raw scores `x` of a tile, and its logits with -inf where keys are dropped."""
        keys = self.k[:, :, tile.first : tile.last]
        queries = self.grouped(self.q[:, :, tile.start : tile.stop])
        scores = self.by_head(queries @ keys.transpose(-1, -2))
        score = self.program.score
        logits = scores
        if score != x:
            logits = torch.as_tensor(self.value(score, tile, scores=scores), dtype=self.acc)
            if not score.has(x):  # it may be a view of an operand, and is masked in place
                logits = logits.to(scores.device).expand(scores.shape).clone()
        return scores, self.mask(logits, tile, -math.inf)

    def mask(self, value: Tensor, tile: _Tile, fill: float) -> Tensor:
        """Overwrites `value` where the tile's rows drop a key."""
        first, last = tile.masked
        if first < last:
            keep = torch.as_tensor(self.value(self.program.keep, tile, tile.masked))
            part = value[..., first - tile.first : last - tile.first]
            part.masked_fill_(~keep.to(value.device), fill)
        return value

    def scatter(
        self, grad: Tensor, part: _Part, tile: _Tile, upstream: Tensor, scores: Tensor
    ) -> None:
        """Adds to an operand's gradient what a tile says about one read of it.

        Args:
            grad: The gradient of the whole operand.
            part: The read, and the slope of its formula.
            tile: Where.
            upstream: The gradient of the formula's value, [B, Hq, rows, keys].
            scores: The tile's raw scores.
        """
        keys = (0, 1) if part.name == "sink" else (tile.first, tile.last)
        share = upstream * self.value(part.slope, tile, keys, scores)
        if part.name == "score":
            share = self.mask(share, tile, 0.0)
        view = slice_of(grad, part.load, self.ranges(tile, keys), self.sizes)
        if view is not None:
            view.add_(share.sum_to_size(view.shape))
            return
        env = self._env(part.load, tile, keys, None)
        index = read_positions(part.load, env, self.operands)
        index = tuple(torch.as_tensor(position, device=grad.device) for position in index)
        shape = torch.broadcast_shapes(*(position.shape for position in index))
        grad.index_put_(index, share.sum_to_size(shape), accumulate=True)

    def weight(self, tile: _Tile) -> Tensor | None:
        """What the softmax's weights are multiplied by; None for nothing."""
        total = self.survivors(tile)
        if self.program.weight is None:
            return total
        factor = torch.as_tensor(self.value(self.program.weight, tile), dtype=self.acc)
        factor = factor.to(self.q.device)
        return factor if total is None else total * factor

    def survivors(self, tile: _Tile) -> Tensor | None:
        """The weights that dropout leaves, scaled up; the same for every way to tile the rows.

        A counter-based generator: each row hashes its number and the seed to a key, each weight
        hashes its row's key and its own number, with Ellis's `lowbias32`.
        """
        if self.dropout_p == 0:
            return None
        assert self.seed is not None
        row = (self.indices[b] * self.heads + self.indices[h]) * self.rows
        row = row + self.indices[t][:, :, tile.start : tile.stop]
        key = _hash32((self.seed.reshape(()) ^ (self.seed.reshape(()) >> 32)).to(torch.int32))
        key = _hash32(_hash32(row.to(torch.int32) + key) ^ (row >> 32).to(torch.int32))
        column = self.indices[s][..., tile.first : tile.last].to(torch.int32)
        number = _hash32(key + column * -1640531535) & 0x7FFFFFFF
        if self.dropout_p == 1:
            return torch.zeros(number.shape, dtype=self.acc, device=number.device)
        kept = (number >= int(self.dropout_p * 2**31)).to(self.acc)
        return kept / (1 - self.dropout_p)


def _from_length(ends: tuple[int, int]) -> tuple[int, int]:
    return ends[0], ends[1] - ends[0]


def _hash32(value: Tensor) -> Tensor:
    """A bijection of int32 that looks random."""
    value = value ^ ((value >> 16) & 0xFFFF)
    value = value * 0x7FEB352D
    value ^= (value >> 15) & 0x1FFFF
    value *= -2073254261  # 0x846CA68B as int32
    value ^= (value >> 16) & 0xFFFF
    return value


def _span(marked: Tensor) -> tuple[Tensor, Tensor]:
    """First marked column of each row and the end of the last one; 0, 0 for none."""
    number = torch.arange(marked.shape[1])
    last = torch.where(marked, number + 1, 0).amax(1)
    first = torch.where(marked, number, marked.shape[1]).amin(1)
    return torch.minimum(first, last), last


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    program: str,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output [B, Hq, T, Dv] and the natural log-sum-exp [B, Hq, T]."""
    problem = _Problem(q, k, v, operands, program, dropout_p, seed)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=problem.acc)
    if not problem.keys:
        return _without_keys(problem, out, lse)
    for tile in problem.tiles():
        rows = slice(tile.start, tile.stop)
        out[:, :, rows], lse[:, :, rows] = _forward_tile(problem, tile)
    return out, lse


def _without_keys(problem: _Problem, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """No keys at all: every row is empty, and the mean of no values is no number."""
    out.fill_(0.0 if problem.empty_weight == 0 else math.nan)
    lse.fill_(-math.inf)
    if problem.program.sink is not None:
        lse.copy_(_sink(problem, _Tile(0, problem.rows, 0, 0, (0, 0))).squeeze(-1))
    return out, lse


def _sink(problem: _Problem, tile: _Tile) -> Tensor:
    """The sink's logit for each row, broadcastable to [B, Hq, rows, 1]."""
    assert problem.program.sink is not None
    value = problem.value(problem.program.sink, tile, (0, 1))
    return torch.as_tensor(value, dtype=problem.acc).to(problem.q.device)


class _Softmax(NamedTuple):
    """The rows of a tile; `weights / total` is the softmax."""

    weights: Tensor  # [B, Hq, rows, keys], overwrites the logits
    total: Tensor  # [B, Hq, rows, 1]; 1 for an empty row
    lse: Tensor  # [B, Hq, rows, 1]; -inf for an empty row without a sink
    sink: Tensor | None  # the sink's weight, to be divided by `total`, too
    is_empty: Tensor


def _softmax(problem: _Problem, tile: _Tile, logits: Tensor) -> _Softmax:
    top = logits.amax(-1, keepdim=True)
    logit = None if problem.program.sink is None else _sink(problem, tile)
    if logit is not None:
        top = torch.maximum(top, logit)
    is_empty = top == -math.inf
    top = top.masked_fill(is_empty, 0.0)
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    sink = None if logit is None else (logit - top).exp()
    if sink is not None:
        total = total + sink
    lse = top + total.log()
    return _Softmax(weights, total.masked_fill(is_empty, 1.0), lse, sink, is_empty)


def _forward_tile(problem: _Problem, tile: _Tile) -> tuple[Tensor, Tensor]:
    _, logits = problem.logits(tile)
    weights, total, lse, _, is_empty = _softmax(problem, tile, logits)
    lse = lse.squeeze(-1)
    factor = problem.weight(tile)
    values = problem.v[:, :, tile.first : tile.last]
    if factor is not None:
        weights = weights.div_(total)
        if problem.empty_weight != 0:
            weights = weights.masked_fill_(is_empty, problem.empty_weight)
        return problem.by_head(problem.grouped(weights * factor) @ values), lse
    out = problem.by_head(problem.grouped(weights) @ values).div_(total)
    if problem.empty_weight != 0:
        mean = problem.v.sum(2, keepdim=True) * problem.empty_weight
        mean = mean.repeat_interleave(problem.heads // problem.kv_heads, dim=1)
        out = torch.where(is_empty, mean, out)
    return out, lse


class _Gradients(NamedTuple):
    """Sums over the tiles, in the dtype of the arithmetic."""

    q: Tensor
    k: Tensor
    v: Tensor
    operands: dict[int, Tensor]  # by number, those wanted


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    lse: Tensor,
    program: str,
    dropout_p: float,
    seed: Tensor | None,
    wanted: Sequence[bool],
    grad_lse: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of `q`, `k`, `v` and of the wanted operands.

    A tile holds whole rows, so their softmax is computed again; `lse` is for kernels whose tiles
    do not.
    """
    problem = _Problem(q, k, v, operands, program, dropout_p, seed)
    acc = problem.acc
    chosen = {i: operand for i, operand in enumerate(operands) if wanted[i]}
    total = _Gradients(
        *(torch.zeros(tensor.shape, dtype=acc, device=q.device) for tensor in (q, k, v)),
        {i: torch.zeros(one.shape, dtype=acc, device=q.device) for i, one in chosen.items()},
    )
    parts = {i: slopes_of(program, i) for i in chosen}
    if problem.keys:
        for tile in problem.tiles():
            rows = slice(tile.start, tile.stop)
            above = None if grad_lse is None else grad_lse[:, :, rows, None].to(acc)
            _backward_tile(problem, tile, grad_out[:, :, rows].to(acc), above, total, parts)
    total.q.mul_(problem.program.scale)
    grads = zip((q, k, v, *chosen.values()), (*total[:3], *total.operands.values()), strict=True)
    return [grad.to(tensor.dtype) for tensor, grad in grads]


def _backward_tile(
    problem: _Problem,
    tile: _Tile,
    grad_out: Tensor,  # [B, Hq, rows, Dv]
    grad_lse: Tensor | None,  # [B, Hq, rows, 1]
    total: _Gradients,
    parts: dict[int, tuple[_Part, ...]],
) -> None:
    """Adds a tile's share to the gradients.

    With `P` the softmax's weights and `F` what they are multiplied by: `dV = (P F)^T dO`,
    `dP = F (dO V^T)`, `dlogits = P (dP - sum(P dP) + dlse)`.
    """
    columns = slice(tile.first, tile.last)
    scores, logits = problem.logits(tile)
    rows_softmax = _softmax(problem, tile, logits)
    weights, is_empty = rows_softmax.weights.div_(rows_softmax.total), rows_softmax.is_empty
    out_rows = problem.grouped(grad_out)
    grad_weights = problem.by_head(out_rows @ problem.v[:, :, columns].transpose(-1, -2))
    factor = problem.weight(tile)
    used = weights
    if problem.empty_weight != 0:
        if factor is None:
            rest = torch.where(is_empty, grad_out * problem.empty_weight, 0.0)
            total.v.add_(problem.grouped(rest).sum(2, keepdim=True))
        else:
            used = weights.masked_fill(is_empty, problem.empty_weight)
    reweighted = used if factor is None else used * factor
    total.v[:, :, columns] += problem.grouped(reweighted).transpose(-1, -2) @ out_rows
    grad_reweighted = grad_weights
    if factor is not None:
        grad_weights = grad_weights * factor
    mean = (weights * grad_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        mean = mean - grad_lse
    grad_logits = weights * (grad_weights - mean)
    for number, found in parts.items():
        for part in found:
            if part.name == "score":
                upstream = grad_logits
            elif part.name == "weight":
                survivors = problem.survivors(tile)
                upstream = used * grad_reweighted
                upstream = upstream if survivors is None else upstream * survivors
            else:
                assert rows_softmax.sink is not None
                upstream = -mean * rows_softmax.sink / rows_softmax.total
            problem.scatter(total.operands[number], part, tile, upstream, scores)
    slope = _score_slope(problem.text)
    grad_scores = grad_logits
    if slope != 1:
        grad_scores = grad_logits * problem.value(slope, tile, scores=scores)
        grad_scores = problem.mask(grad_scores, tile, 0.0)
    grad_scores = problem.grouped(grad_scores)
    rows = slice(tile.start, tile.stop)
    total.q[:, :, rows] = problem.by_head(grad_scores @ problem.k[:, :, columns])
    queries = problem.grouped(problem.q[:, :, rows])
    total.k[:, :, columns] += grad_scores.transpose(-1, -2) @ queries
