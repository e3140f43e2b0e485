"""Weights that make a tiny random model a strict test.

Fresh models start with tiny weights and gates at zero: their attention is nearly uniform and whole
branches give nothing, so a wrong scale or a lost bias would not show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import SEED
from benchmarks.zoo.truth import tensors


def stirred(
    make: Callable[[], nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> nn.Module:
    """A model with lively weights, or as it came where these give no finite output.

    Args:
        make: Builds the model.
        args: Positional arguments with which it runs.
        kwargs: Keyword arguments.
    """
    torch.manual_seed(SEED)
    model = make()
    stir(model)
    try:
        torch.manual_seed(SEED)
        with torch.no_grad():
            good = all(_calm(leaf) for leaf in tensors(model(*args, **kwargs)))
    except (RuntimeError, ValueError, IndexError, AssertionError):
        good = False
    torch.manual_seed(SEED)
    fresh = make()
    if good:
        stir(fresh)  # a run may have changed buffers
    return fresh


def stir(model: nn.Module) -> None:
    """Draw matrices with unit gain, and move every vector a little."""
    make = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.is_floating_point() or weight.numel() == 0:
                continue
            noise = torch.randn(weight.shape, generator=make)
            if weight.dim() < 2:
                weight.add_(0.1 * noise)
            else:
                weight.copy_(noise / max(1, weight[0].numel()) ** 0.5)


def _calm(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.numel() == 0:
        return True
    finite = leaf[torch.isfinite(leaf)]
    return finite.numel() > 0 and float(finite.abs().max()) < 1e4
