"""Keys and values in pages: written, read back and copied, with a sketch of the keys in INT4.

A pool holds the pages of one layer, [P, Hkv, 2, N, D]: keys and values of a head lie side by side.
The sketch of a key is what Progressive Sparse Attention orders pages by: D codes of four bits, a
scale and the smallest channel.

Source: pages, block tables and copy on write as in PagedAttention (Kwon et al., 2023, sections 4.1
and 4.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

APPEND_OP = "sparse_compile::paged_append"
GATHER_OP = "sparse_compile::paged_gather"
COPY_OP = "sparse_compile::cow_copy"
LARGEST = 65504.0  # of float16
LEVELS = 15  # steps between the smallest and the largest channel of a key

torch.library.define(
    APPEND_OP,
    "(Tensor k, Tensor v, Tensor(a!) pool, Tensor block_table, Tensor seq_lens, Tensor? n_new, "
    "Tensor(b!)? codes, Tensor(c!)? scales) -> ()",
)
torch.library.define(
    GATHER_OP,
    "(Tensor pool, Tensor block_table, Tensor seq_lens, SymInt n_keys, Tensor? codes=None, "
    "Tensor? scales=None) -> (Tensor k, Tensor v)",  # a sketch is for what may replace the gather
)
torch.library.define(COPY_OP, "(Tensor(a!)[] tensors, Tensor sources, Tensor targets) -> ()")


class Sketch(NamedTuple):
    """The keys of a pool in four bits a channel.

    Channel `d` of a key is about `scales[..., 1] + code * scales[..., 0]`.
    """

    codes: Tensor  # [P, Hkv, N, D / 2] uint8: channel d in the low half, d + D / 2 in the high one
    scales: Tensor  # [P, Hkv, N, 2] float16: the step between codes, and what code 0 stands for

    @staticmethod
    def empty(pool: Tensor) -> Sketch:
        """Room for the sketch of a pool [P, Hkv, 2, N, D]; D is even."""
        n_pages, heads, _, page_size, head_dim = pool.shape
        shape = (n_pages, heads, page_size)
        return Sketch(
            pool.new_zeros((*shape, head_dim // 2), dtype=torch.uint8),
            pool.new_zeros((*shape, 2), dtype=torch.float16),
        )

    def keys(self) -> Tensor:
        """The keys as the sketch has them, [P, Hkv, N, D] float32."""
        halves = torch.cat([self.codes & 15, self.codes >> 4], dim=-1)
        step, lowest = self.scales.float().split(1, dim=-1)
        return lowest + step * halves


def sketch_ref(k: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., D / 2] and scales [..., 2] of keys [..., D], in plain PyTorch.

    The step and the lowest channel are rounded to float16 first, and codes fit what they are then.
    Both are NaN for a key that is not finite.
    """
    k = k.float()
    low, high = k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)
    scales = torch.cat([(high - low) / LEVELS, low], dim=-1).clamp(-LARGEST, LARGEST).half()
    scales = scales.masked_fill(~k.isfinite().all(-1, keepdim=True), torch.nan)
    step, lowest = scales.float().split(1, dim=-1)
    codes = ((k - lowest) / step.where(step > 0, 1.0) + 0.5).floor().clamp(0, LEVELS)
    low_half, high_half = codes.nan_to_num(0.0).to(torch.uint8).chunk(2, dim=-1)
    return low_half | (high_half << 4), scales


def places_ref(
    block_table: Tensor, position: Tensor, n_pages: int, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Page and slot of positions [B, T], and whether the table has a page there."""
    entry = position // page_size
    there = (position >= 0) & (entry < block_table.shape[1])
    if block_table.shape[1] == 0:
        return torch.zeros_like(position), position % page_size, there
    page = block_table.long().gather(1, entry.clamp(0, block_table.shape[1] - 1))
    there &= (page >= 0) & (page < n_pages)
    return page, position % page_size, there


def paged_append_ref(
    k: Tensor, v: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor,
    n_new: Tensor | None, codes: Tensor | None, scales: Tensor | None,
) -> None:  # fmt: skip
    """What the operator must do, in plain PyTorch.

    Args:
        k: New keys, [B, Hkv, T, D].
        v: New values, [B, Hkv, T, D].
        pool: Where they are written, [P, Hkv, 2, N, D].
        block_table: Pages of each sequence, [B, L] int32; -1 is none.
        seq_lens: Tokens of each sequence after the call, [B] int32.
        n_new: How many of the T are new, counted from the first, [B] int32; all if left out. They
            are the last ones of the sequence.
        codes: Codes of the sketch, [P, Hkv, N, D / 2].
        scales: Its scales, [P, Hkv, N, 2].
    """
    n_pages, _, _, page_size, _ = pool.shape
    t = torch.arange(k.shape[2], device=k.device)
    count = k.shape[2] if n_new is None else n_new.long()[:, None]
    position = seq_lens.long()[:, None] - count + t
    page, slot, there = places_ref(block_table, position, n_pages, page_size)
    there &= t < count
    page, slot = page[there], slot[there]
    new_k, new_v = (x.transpose(1, 2)[there] for x in (k, v))  # [new, Hkv, D]
    pool[page, :, 0, slot] = new_k.to(pool.dtype)
    pool[page, :, 1, slot] = new_v.to(pool.dtype)
    if codes is not None and scales is not None:
        codes[page, :, slot], scales[page, :, slot] = sketch_ref(new_k)


def paged_gather_ref(
    pool: Tensor, block_table: Tensor, seq_lens: Tensor, n_keys: int
) -> tuple[Tensor, Tensor]:
    """What the operator must compute, in plain PyTorch.

    Args:
        pool: Keys and values, [P, Hkv, 2, N, D].
        block_table: Pages of each sequence, [B, L] int32; -1 is none.
        seq_lens: Tokens of each sequence, [B] int32.
        n_keys: S.
    Returns:
        Keys and values of the first S positions, [B, Hkv, S, D] each; 0 behind a sequence's end.
    """
    n_pages, _, _, page_size, _ = pool.shape
    position = torch.arange(n_keys, device=pool.device).expand(block_table.shape[0], n_keys)
    page, slot, there = places_ref(block_table, position, n_pages, page_size)
    there &= position < seq_lens.long()[:, None]
    if n_pages == 0:
        page, there = torch.zeros_like(page), torch.zeros_like(there)
        pool = pool.new_zeros((1, *pool.shape[1:]))
    found = pool[page.where(there, 0), :, :, slot]  # [B, S, Hkv, 2, D]
    found = found.masked_fill(~there[..., None, None, None], 0.0).transpose(1, 2)
    return found[:, :, :, 0].contiguous(), found[:, :, :, 1].contiguous()


def cow_copy_ref(tensors: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Copy pages: `targets[i]` gets what `sources[i]` has; all are read before any is written.

    Args:
        tensors: Pools and sketches, pages on their first axis.
        sources: Pages, [n] int32 or int64.
        targets: Others, [n], each once.
    """
    for tensor in tensors:
        tensor.index_copy_(0, targets.long(), tensor.index_select(0, sources.long()))


def append(k, v, pool, block_table, seq_lens, n_new, codes, scales):
    """`paged_append` by a Triton kernel."""
    from sparse_compile.kernels import paged_kernels  # Triton takes long to load

    paged_kernels.append(k, v, pool, block_table, seq_lens, n_new, codes, scales)


def _gather_cpu(pool, block_table, seq_lens, n_keys, codes=None, scales=None):
    return paged_gather_ref(pool, block_table, seq_lens, n_keys)


def gather(pool, block_table, seq_lens, n_keys, codes=None, scales=None):
    """`paged_gather` by a Triton kernel."""
    from sparse_compile.kernels import paged_kernels

    return paged_kernels.gather(pool, block_table, seq_lens, n_keys)


for _op, _cpu, _cuda in (
    (APPEND_OP, paged_append_ref, append),
    (GATHER_OP, _gather_cpu, gather),
    (COPY_OP, cow_copy_ref, cow_copy_ref),
):
    torch.library.impl(_op, "cpu", _cpu)
    torch.library.impl(_op, "cuda", _cuda)


@torch.library.register_fake(APPEND_OP)
def _append_fake(k, v, pool, block_table, seq_lens, n_new, codes, scales):
    return None


@torch.library.register_fake(GATHER_OP)
def _gather_fake(pool, block_table, seq_lens, n_keys, codes=None, scales=None):
    shape = (block_table.shape[0], pool.shape[1], n_keys, pool.shape[4])
    return pool.new_empty(shape), pool.new_empty(shape)


@torch.library.register_fake(COPY_OP)
def _copy_fake(tensors, sources, targets):
    return None
