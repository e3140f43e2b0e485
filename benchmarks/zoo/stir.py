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


def stirred(make: Callable[[], nn.Module], inputs_of: Callable[[nn.Module], dict]) -> nn.Module:
    """A model with lively weights, or as it came where these give no finite output.

    Args:
        make: Builds the model.
        inputs_of: Gives keyword arguments with which it runs.
    """
    torch.manual_seed(SEED)
    model = make()
    inputs = inputs_of(model)
    stir(model)
    try:
        with torch.no_grad():
            good = all(_calm(leaf) for leaf in tensors(model(**inputs)))
    except (RuntimeError, ValueError, IndexError):
        good = False
    if good:
        return model
    torch.manual_seed(SEED)
    return make()


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
