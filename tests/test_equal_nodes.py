"""Nodes of the same value are found, and only those."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.passes import elements
from sparse_compile.passes.equal_nodes import representatives
from sparse_compile.testing import rewritten_alike, shadow_of

T = 5


def count(function: Callable[..., object], *args: Tensor) -> int:
    """How many nodes have the value of an earlier one."""
    shadow = shadow_of(function, *args)
    found = representatives(shadow.graph, shadow.writes)
    return sum(first is not node for node, first in found.items())


def test_the_same_computation_has_one_representative() -> None:
    assert count(lambda x: (x + 1).sin() * (x + 1).sin(), torch.randn(3)) == 2


DIFFERENT: dict[str, Callable[[Tensor], object]] = {
    "arguments": lambda x: (x + 1) * (x + 2),
    "types": lambda x: (x.sum() + 1) * (x.sum() + 1.0).int(),
    "random": lambda x: F.dropout(x, 0.5) * F.dropout(x, 0.5),
    "made-and-written": lambda x: torch.zeros(3).add_(x[0]) * torch.zeros(3).mul_(x[1]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_values_stay_apart(name: str) -> None:
    shadow = shadow_of(DIFFERENT[name], torch.randn(3))
    found = representatives(shadow.graph, shadow.writes)
    products = [node for node in shadow.graph.nodes if node.name.startswith("mul")]
    left, right = products[-1].args[:2]
    assert found[left] is not found[right]


def test_a_read_after_a_write_is_another_value() -> None:
    def function(x: Tensor) -> Tensor:
        memory = x * 1
        before = memory.sin()
        memory.add_(1)
        return before * memory.sin()

    assert count(function, torch.randn(3)) == 0


def test_layers_that_compute_the_same_mask_are_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    evaluate = elements.ElementEvaluator._evaluate

    def counted(self: elements.ElementEvaluator, node: object, index: object) -> object:
        seen.append(node)
        return evaluate(self, node, index)  # type: ignore[arg-type]

    monkeypatch.setattr(elements.ElementEvaluator, "_evaluate", counted)

    def layers(x: Tensor, count: int) -> Tensor:
        for _ in range(count):
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            x = (x @ x.mT).masked_fill(future, float("-inf")).softmax(-1) @ x
        return x

    def steps(count: int) -> int:
        seen.clear()
        torch._dynamo.reset()
        sites = rewritten_alike(
            lambda x: layers(x, count), torch.randn(2, 3, T, 8, dtype=torch.float64)
        )
        assert [site.mask for site in sites] == ["causal"] * count
        return len(seen)

    assert steps(4) == steps(1) > 0
