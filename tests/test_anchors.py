"""Softmaxes in every spelling, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_compile.passes.anchors import Anchor, find_anchors

Softmax = Callable[[Tensor], Tensor]


def anchors_of(function: Softmax, *shape: int) -> list[Anchor]:
    x = torch.randn(shape or (2, 3, 4))
    return list(find_anchors(make_fx(function, pre_dispatch=True, tracing_mode="fake")(x).graph))


def exp_over_sum(x: Tensor) -> Tensor:
    powers = x.exp()
    return powers / powers.sum(-1, keepdim=True)


def masked(x: Tensor) -> Tensor:
    powers = x.exp() * (torch.ones(4, 4).tril()[:3] > 0)
    return powers / powers.sum(-1, keepdim=True)


def zero_filled(x: Tensor) -> Tensor:
    powers = x.exp().masked_fill(torch.ones(3, 4).tril() == 0, 0.0)
    return powers / powers.sum(-1, keepdim=True)


SOFTMAXES: dict[str, Softmax] = {
    "function": lambda x: torch.softmax(x, -1),
    "functional": lambda x: F.softmax(x, dim=2),
    "method": lambda x: x.softmax(dim=-1),
    "module": nn.Softmax(dim=-1),
    "other-dtype": lambda x: torch.softmax(x, -1, dtype=torch.float64),
    "exp-of-log": lambda x: torch.log_softmax(x, -1).exp(),
    "logsumexp": lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
    "logsumexp-unsqueezed": lambda x: (x - x.logsumexp(-1)[..., None]).exp(),
    "by-hand": exp_over_sum,
    "by-hand-safe": lambda x: exp_over_sum(x - x.amax(-1, keepdim=True)),
    "by-hand-max-values": lambda x: exp_over_sum(x - x.max(-1, keepdim=True).values.detach()),
    "by-hand-expanded": lambda x: (
        lambda e: e / e.sum(-1).unsqueeze(-1).expand(2, 3, 4)
    )(x.exp()),
    "reciprocal": lambda x: (lambda e: e * e.sum(-1, keepdim=True).reciprocal())(x.exp()),
    "masked-by-hand": masked,
    "zero-filled-by-hand": zero_filled,
}  # fmt: skip


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_is_found_once(name: str) -> None:
    (found,) = anchors_of(SOFTMAXES[name])
    (out,) = found.weights.graph.output_node().all_input_nodes
    assert found.weights is out
    assert found.dim == 2
    assert found.sink is None


@pytest.mark.parametrize("dim", [0, 1, -2])
def test_the_dimension_is_the_softmax_s_own(dim: int) -> None:
    def by_hand(x: Tensor) -> Tensor:
        powers = x.exp()
        return powers / powers.sum(dim, keepdim=True)

    for function in (lambda x: x.softmax(dim), by_hand):
        assert [anchor.dim for anchor in anchors_of(function)] == [dim % 3]


def test_the_mask_of_a_softmax_by_hand_is_kept() -> None:
    (found,) = anchors_of(masked)
    assert isinstance(found.keep, fx.Node)
    assert found.keep.meta["val"].shape == (3, 4)
    assert found.logits.op == "placeholder"


def over_sum_plus(addend: float, *, shifted: bool, **options: float) -> Softmax:
    def function(x: Tensor) -> Tensor:
        powers = (x - x.amax(-1, keepdim=True) if shifted else x).exp()
        return powers / torch.add(powers.sum(-1, keepdim=True), addend, **options)

    return function


def test_an_addend_of_the_denominator_is_a_sink() -> None:
    (found,) = anchors_of(over_sum_plus(1.0, shifted=False))
    assert found.sink == 0
    (found,) = anchors_of(over_sum_plus(2.5, shifted=False))
    assert float(found.sink) == pytest.approx(0.9162907318741551)  # log(2.5)


def test_protection_from_rounding_is_no_sink() -> None:
    (found,) = anchors_of(over_sum_plus(1e-9, shifted=True))  # the sum is at least 1
    assert found.sink is None


def test_the_factor_of_an_addend_is_not_forgotten() -> None:
    found = anchors_of(over_sum_plus(1.0, shifted=False, alpha=3.0))
    assert [float(anchor.sink) for anchor in found] in ([], [pytest.approx(1.0986122886681098)])


def sum_of_other(x: Tensor) -> Tensor:
    return x.exp() / (2 * x).exp().sum(-1, keepdim=True)


NO_SOFTMAXES: dict[str, Softmax] = {
    "sum-of-other": sum_of_other,
    "sum-of-two-dims": lambda x: (lambda e: e / e.sum((-1, -2), keepdim=True))(x.exp()),
    "sum-in-wrong-place": lambda x: (lambda e: e / e.sum(-1))(x[0, :3, :3].exp()),
    "no-exp": lambda x: x / x.sum(-1, keepdim=True),
    "negative-addend": over_sum_plus(-0.5, shifted=False),
    "large-addend-when-shifted": over_sum_plus(1.0, shifted=True),
    "lower-bound-that-counts": lambda x: (lambda e: e / e.sum(-1, keepdim=True).clamp(min=1.0))(x.exp()),
    "upper-bound": lambda x: (lambda e: e / e.sum(-1, keepdim=True).clamp(max=1.0))(x.exp()),
    "shift-by-another-maximum": lambda x: (
        lambda e: e / (e.sum(-1, keepdim=True) + 1e-6)
    )((x - (100 * x).amax(-1, keepdim=True)).exp()),
    "shift-by-the-global-maximum": lambda x: (
        lambda e: e / (e.sum(-1, keepdim=True) + 1e-6)
    )((x - x.amax()).exp()),
    "log-softmax-alone": lambda x: x.log_softmax(-1),
    "logsumexp-of-other": lambda x: (x - (2 * x).logsumexp(-1, keepdim=True)).exp(),
    "logsumexp-in-wrong-place": lambda x: (lambda y: (y - y.logsumexp(-1)).exp())(x[0, :3, :3]),
    "sigmoid": torch.sigmoid,
}  # fmt: skip


@pytest.mark.parametrize("name", NO_SOFTMAXES)
def test_what_only_looks_like_a_softmax_is_none(name: str) -> None:
    assert anchors_of(NO_SOFTMAXES[name]) == []


def test_a_scalar_has_no_softmax() -> None:
    assert anchors_of(lambda x: x.sum().softmax(-1)) == []


def test_softmaxes_come_in_the_order_of_the_graph() -> None:
    found = anchors_of(lambda x: x.softmax(-1) + x.softmax(-2) + x.softmax(0))
    assert [anchor.dim for anchor in found] == [2, 1, 0]
