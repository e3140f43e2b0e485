"""Rounding of Python floats to the floating-point types of tensors, without making a tensor."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import sympy

_FORMATS = {torch.float16: "e", torch.float32: "f", torch.float64: "d"}


def round_to(value: float, dtype: torch.dtype) -> float | None:
    """The number of type `dtype` nearest to `value`; None for types that are not handled."""
    if not math.isfinite(value):
        return value
    if dtype == torch.bfloat16:
        return _to_bfloat16(value)
    if dtype not in _FORMATS:
        return None
    try:
        return struct.unpack(_FORMATS[dtype], struct.pack(_FORMATS[dtype], value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def is_representable(value: sympy.Expr, dtype: torch.dtype) -> bool:
    """True if `value` is a number that `dtype` holds exactly."""
    if not value.is_number:
        return False
    number = float(value)
    return round_to(number, dtype) == number


def _to_bfloat16(value: float) -> float:
    single = round_to(value, torch.float32)
    if single is None or not math.isfinite(single):
        return math.copysign(math.inf, value)
    bits = struct.unpack("I", struct.pack("f", single))[0]
    bits += 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    return struct.unpack("f", struct.pack("I", bits & 0xFFFF0000))[0]
