"""Functions that printed Triton code calls: whole division as Python has it, and three tanh."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def floor_mod(a, b):
    """What a division rounded down leaves; has the sign of `b`."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def floor_div(a, b):
    """The quotient, rounded down."""
    return (a - floor_mod(a, b)) // b


@triton.jit
def tanh_accurate(x):
    """tanh within 4 steps of float32: by powers of two, and for small `x` by its series."""
    small = x * x
    # the first term left out is below 2e-8 of tanh(x) for |x| < 0.25
    series = small * (
        0.13333333333333333 + small * (-0.05396825396825397 + small * 0.021869488536155203)
    )
    near = x + x * small * (-0.3333333333333333 + series)
    return tl.where(tl.abs(x) < 0.25, near, tanh_fast(x))


@triton.jit
def tanh_fast(x):
    """tanh with an absolute error below 3e-7: two of the special function unit's operations."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))


@triton.jit
def tanh_approximate(x):
    """tanh with a relative error of at most 2 ** -11, in one instruction (sm_75 and newer).

    A fourth of what rounding the same number to bfloat16 loses.
    """
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
