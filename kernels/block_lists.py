"""Lists of blocks for PyTorch's `flex_attention`, from dense masks over blocks.

An operator of its own, because flex_attention's kernels take these tensors to be contiguous: as
ordinary operators Inductor may give them other strides (seen in torch 2.11: a stride of 8 for a
dimension of size 1 in inference, wrong results and illegal reads).
"""

from __future__ import annotations

import torch
from torch import Tensor

OP = "sparse_compile::block_lists_v1"

torch.library.define(OP, "(Tensor partial, Tensor full) -> Tensor[]")


def block_lists_ref(partial: Tensor, full: Tensor) -> list[Tensor]:
    """Counts and lists of partial and full blocks, by rows and then by columns.

    Args:
        partial: Blocks that hold kept and dropped elements, Boolean [B, H, rows, columns].
        full: Blocks without dropped elements, likewise.
    Returns:
        Eight contiguous int32 tensors: the count of partial blocks of each row [B, H, rows] and
        their columns, ascending, the others behind [B, H, rows, columns]; the same for full blocks;
        the same four by columns.
    """
    partial, full = torch.broadcast_tensors(partial, full)
    by_rows = (partial, full)
    by_columns = (partial.transpose(-2, -1), full.transpose(-2, -1))
    found: list[Tensor] = []
    for dense in (*by_rows, *by_columns):
        number = dense.to(torch.int32)
        order = torch.argsort(number, dim=-1, descending=True, stable=True)
        found.append(number.sum(-1).to(torch.int32).contiguous())
        found.append(order.to(torch.int32).contiguous())
    return found


torch.library.impl(OP, ("cpu", "cuda"), block_lists_ref)


@torch.library.register_fake(OP)
def _fake(partial, full):
    batch, heads, rows, columns = torch.broadcast_shapes(partial.shape, full.shape)
    shapes = [(rows, columns)] * 2 + [(columns, rows)] * 2
    found = []
    for own, others in shapes:
        found.append(partial.new_empty((batch, heads, own), dtype=torch.int32))
        found.append(partial.new_empty((batch, heads, own, others), dtype=torch.int32))
    return found
