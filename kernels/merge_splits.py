"""Several programs share the keys of a row; what each found is merged as FlashDecoding does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sparse_compile.kernels.launching import padded

if TYPE_CHECKING:
    from torch import Tensor

MERGED_NUMBERS = 2**12  # of partial results that a program holds


@triton.jit(do_not_specialize=["n_rows"])
def _merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, n_rows,
    DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program merges the shares of BLOCK_R rows."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    split = tl.arange(0, BLOCK_S)
    dv = tl.arange(0, BLOCK_DV)
    live = r < n_rows
    there = live[:, None] & (split[None, :] < SPLITS)
    at = r[:, None] * SPLITS + split[None, :]
    part_lse = tl.load(part_lse_ptr + at, mask=there, other=-float("inf"))  # [BLOCK_R, BLOCK_S]
    part = tl.load(
        part_ptr + at[:, :, None] * DV + dv[None, None, :],
        mask=there[:, :, None] & (dv[None, None, :] < DV), other=0.0,
    )  # [BLOCK_R, BLOCK_S, BLOCK_DV]  # fmt: skip
    highest = tl.max(part_lse, 1)
    reference = tl.where(highest == -float("inf"), 0.0, highest)
    weight = tl.exp2((part_lse - reference[:, None]) * 1.4426950408889634)
    total = tl.sum(weight, 1)
    acc = tl.sum(part * weight[:, :, None], 1) / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out_ptr + r[:, None] * DV + dv[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    tl.store(lse_ptr + r, highest + tl.log(total), mask=live)


def n_splits(n_programs: int, n_parts: int, wanted: int) -> int:
    """Programs that share the keys of a row: as many as bring the programs to `wanted`.

    Args:
        n_programs: Without sharing.
        n_parts: Into which the keys of a row can be cut; no program gets less than one.
        wanted: Programs that keep a device busy.
    """
    if n_programs >= wanted or n_programs == 0:
        return 1
    return min(n_parts, -(-wanted // n_programs))


def merge(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge the shares of rows.

    Args:
        part: What each share gives by itself, [..., splits, Dv] float32, contiguous.
        part_lse: Its natural log-sum-exp, [..., splits] float32; -inf for a share without keys.
        out: Where to write the output, [..., Dv], contiguous.
        lse: Where to write its natural log-sum-exp, [...] float32, contiguous.
    """
    splits, value_dim = part.shape[-2:]
    block_s, block_dv = triton.next_power_of_2(splits), padded(value_dim)
    block_r = max(1, MERGED_NUMBERS // (block_s * block_dv))
    _merge_kernel[(triton.cdiv(lse.numel(), block_r),)](
        part, part_lse, out, lse, lse.numel(), value_dim, splits, block_s, block_dv, block_r
    )
