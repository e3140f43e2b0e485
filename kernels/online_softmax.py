"""The online softmax of a program's rows, as steps that kernels share.

A program carries, for each row, the highest logit so far (of base 2), the total of the powers of two
relative to it, and the weighted sum of values relative to it.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al.,
"FlashAttention" (2022), algorithm 1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_keys(acc, total, highest, z, v, unit, PRECISION: tl.constexpr):
    """Add keys with scores `z` [M, N] and values `v` [N, DV]; `unit`, above zero, makes base 2."""
    new = tl.maximum(highest, tl.max(z, 1) * unit)
    reference = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(z * unit - reference[:, None])
    shrink = tl.exp2(highest - reference)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new


@triton.jit
def add_sink(acc, total, highest, sink):
    """Add a logit of base 2 that has no value, [M]."""
    new = tl.maximum(highest, sink)
    reference = tl.where(new == -float("inf"), 0.0, new)
    shrink = tl.exp2(highest - reference)
    return acc * shrink[:, None], total * shrink + tl.exp2(sink - reference), new


@triton.jit
def normalised(acc, total):
    """The output of the rows: 0 where there was no key."""
    return acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
