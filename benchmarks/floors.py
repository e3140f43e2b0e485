"""What an attention must at least cost, and what the project aims at.

Rates were measured on one H100 80GB: large bf16 products, copies in memory, reads of tiles from the
L2 cache, and reads and writes of a scratch that stays in it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.common import Record

MATMUL_FLOPS_PER_S = 791e12
MEMORY_BYTES_PER_S = 3.0e12
L2_READ_BYTES_PER_S = 7.6e12
L2_SCRATCH_BYTES_PER_S = 4.5e12

# (tokens, group): milliseconds of forward and backward, 32 query heads of 128, 16 KV blocks of 64
TARGETS = {
    (32768, 16): (3.5, 8.0),
    (32768, 4): (4.0, 8.0),
    (32768, 1): (5.0, 9.0),
    (65536, 16): (7.0, 16.0),
    (65536, 4): (8.0, 16.0),
    (65536, 1): (10.0, 18.0),
}
CORE_TARGETS = {(32768, 16): (7.0, 15.0), (32768, 4): (9.0, 16.0), (32768, 1): (20.0, 25.0)}
PATTERN_GAINS = {"random": 1.0, "clustered": 1.5}  # how much faster than on `random`
EXTRA_MIB = {(32768, "forward"): 320, (32768, "backward"): 900}  # beyond inputs and outputs


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one attention."""

    tokens: int
    group: int
    query_heads: int = 32
    head_dim: int = 128
    slots: int = 16
    block_size: int = 64
    itemsize: int = 2

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.query_heads // self.group

    @property
    def query_bytes(self) -> int:
        """Of the queries, of the output, or of a gradient of either."""
        return self.tokens * self.query_heads * self.head_dim * self.itemsize

    @property
    def key_bytes(self) -> int:
        """Of the keys, of the values, or of a gradient of either."""
        return self.tokens * self.kv_heads * self.head_dim * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Core:
    """The sizes of one core."""

    shape: Shape
    window: int = 512
    block: int = 32
    stride: int = 16

    @property
    def sizes(self) -> dict[str, int]:
        """As our functions name those of the compressed keys."""
        return {"block": self.block, "stride": self.stride}

    @property
    def n_compressed(self) -> int:
        """Compressed keys."""
        return max(0, (self.shape.tokens - self.block) // self.stride + 1)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Work that cannot be avoided, and the time that it takes at the rates of the device."""

    flops: float
    n_bytes: float
    flops_ms: float = field(init=False)
    bytes_ms: float = field(init=False)
    floor_ms: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flops_ms", self.flops / MATMUL_FLOPS_PER_S * 1e3)
        object.__setattr__(self, "bytes_ms", self.n_bytes / MEMORY_BYTES_PER_S * 1e3)
        object.__setattr__(self, "floor_ms", max(self.flops_ms, self.bytes_ms))

    def __add__(self, other: Floor) -> Floor:
        return Floor(flops=self.flops + other.flops, n_bytes=self.n_bytes + other.n_bytes)

    def fields(self) -> Record:
        """As fields of a record."""
        return asdict(self)


def count(block_indices: Tensor, block_size: int) -> tuple[int, int]:
    """Count what causal self-attention has to do for a selection.

    Args:
        block_indices: [B, Hkv, T, K], -1 padded.
        block_size: Keys in a KV block.

    Returns:
        How many KV blocks are selected, and how many keys are read, by all tokens and KV heads.
    """
    n_blocks = n_keys = 0
    position = torch.arange(block_indices.shape[2], device=block_indices.device)[:, None]
    for head in block_indices.flatten(0, 1):
        live = (head >= 0) & (head * block_size <= position)
        keys = (position + 1 - head * block_size).clamp(max=block_size)
        n_blocks += int(live.sum())
        n_keys += int(keys.where(live, 0).sum())
    return n_blocks, n_keys


def attention(
    shape: Shape, n_pairs: int, direction: str, other_bytes: float = 0.0, n_keys: int | None = None
) -> Floor:
    """The floor of an attention in which rows read keys `n_pairs` times together.

    Two matrix products forward and five backward; every tensor is moved once.

    Args:
        shape: The sizes.
        n_pairs: Pairs of a query row and a key that it reads, over all query heads.
        direction: `forward`, `backward` or `step`, which is both.
        other_bytes: Bytes of what else is moved.
        n_keys: How many keys there are, if not as many as tokens.
    """
    n_products = {"forward": 2, "backward": 5, "step": 7}[direction]
    # forward: q, out; k, v. Backward: q, out, grad of out and of q; k, v and their gradients.
    n_query, n_key = {"forward": (2, 2), "backward": (4, 4), "step": (6, 6)}[direction]
    key_bytes = shape.key_bytes // shape.tokens * (shape.tokens if n_keys is None else n_keys)
    moved = n_query * shape.query_bytes + n_key * key_bytes
    return Floor(
        flops=2.0 * n_products * n_pairs * shape.head_dim, n_bytes=float(moved + other_bytes)
    )


def choice(shape: Shape, n_pairs: int, n_keys: int) -> Floor:
    """The floor of scoring and choosing KV blocks: one product, `q` and the compressed keys."""
    key_bytes = shape.key_bytes // shape.tokens * n_keys
    list_bytes = 4 * shape.tokens * shape.kv_heads * shape.slots
    return Floor(
        flops=2.0 * n_pairs * shape.head_dim,
        n_bytes=float(shape.query_bytes + key_bytes + list_bytes),
    )


def window_pairs(tokens: int, width: int) -> int:
    """How many keys all tokens read that read the last `width` each."""
    width = min(width, tokens)
    return tokens * width - width * (width - 1) // 2


def compressed_pairs(tokens: int, block: int, stride: int) -> int:
    """How many compressed keys all tokens read that read those behind them."""
    n_compressed = max(0, (tokens - block) // stride + 1)
    return sum(tokens - (c * stride + block - 1) for c in range(n_compressed))


def of_core(part: str, core: Core, lists: Tensor, direction: str) -> Floor:
    """The floor of a part, or of the whole: all its products, and every tensor moved once."""
    shape, heads, n_keys = core.shape, core.shape.query_heads, core.n_compressed
    n_compressed = compressed_pairs(shape.tokens, core.block, core.stride) * heads
    compressed = attention(shape, n_compressed, direction, n_keys=n_keys)
    choosing = choice(shape, n_compressed, n_keys)
    if part == "dense":
        n_pairs = heads * shape.tokens * (shape.tokens + 1) // 2
        return attention(shape, n_pairs, direction)
    if part == "compressed":
        return compressed
    if part == "choice":
        return choosing
    if part == "compressed and choice":
        return compressed if direction == "backward" else compressed + choosing
    n_near = window_pairs(shape.tokens, core.window) * heads
    near = attention(shape, n_near, direction)
    if part == "window":
        return near
    n_selected = count(lists, shape.block_size)[1] * shape.group
    selected = attention(shape, n_selected, direction, lists.nbytes)
    if part == "selected":
        return selected
    flops = compressed.flops + selected.flops + near.flops
    flops += 0.0 if direction == "backward" else choosing.flops
    # the branches share q, k, v and the sum; the lists need not leave the chip
    shared = attention(shape, 0, direction)
    compressed_bytes = shape.key_bytes // shape.tokens * n_keys
    passes = {"forward": 1, "backward": 2, "step": 3}[direction]
    gate_bytes = 3 * shape.tokens * heads * shape.itemsize
    n_bytes = shared.n_bytes + passes * (2 * compressed_bytes + gate_bytes)
    return Floor(flops=flops, n_bytes=n_bytes)


def loop_order_ms(order: str, shape: Shape, n_blocks: int, direction: str) -> float | None:
    """Time that a loop order spends on the L2 cache at least, None where none is known.

    `query_major` reads every selected key and value; `kv_major` writes and reads a partial output,
    or a partial gradient of `q`, for every selection of every query head.
    """
    if order == "query_major" and direction == "forward":
        n_bytes = n_blocks * shape.block_size * 2 * shape.head_dim * shape.itemsize
        return n_bytes / L2_READ_BYTES_PER_S * 1e3
    if order == "kv_major" and direction in ("forward", "backward"):
        n_bytes = n_blocks * shape.group * 2 * shape.head_dim * shape.itemsize
        return n_bytes / L2_SCRATCH_BYTES_PER_S * 1e3
    return None


def target_ms(tokens: int, group: int, pattern: str, direction: str) -> float | None:
    """What the project aims at for selected attention, None where nothing was agreed."""
    found, gain = TARGETS.get((tokens, group)), PATTERN_GAINS.get(pattern)
    if found is None or gain is None or direction not in ("forward", "backward"):
        return None
    return found[direction == "backward"] / gain


def core_target_ms(tokens: int, group: int, direction: str) -> float | None:
    """What the project aims at for the whole core, None where nothing was agreed."""
    found = CORE_TARGETS.get((tokens, group))
    if found is None or direction not in ("forward", "backward"):
        return None
    return found[direction == "backward"]
