"""Biases by distance become tables of T + S - 1 numbers a head; others stay what they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_compile
from sparse_compile import backend
from sparse_compile.passes import distance_tables
from sparse_compile.testing import rewritten_alike

B, H, D, BUCKETS = 2, 3, 8, 8
WEIGHT = torch.randn(BUCKETS, H, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _tables_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance_tables, "DEVICES", frozenset(["cpu"]))


def bucket(offset: Tensor) -> Tensor:
    """T5's bucket of a distance: exact when near, logarithmic when far."""
    far = 2 + (torch.log(offset.abs().float() / 2) / math.log(8 / 2) * 2).to(torch.long)
    far = torch.min(far, torch.full_like(far, 3))
    return (offset > 0).to(torch.long) * 4 + torch.where(offset.abs() < 2, offset.abs(), far)


def offsets(n_queries: int, n_keys: int) -> Tensor:
    return torch.arange(n_keys)[None, :] - torch.arange(n_queries)[:, None]


def t5(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    where = bucket(offsets(q.shape[2], k.shape[2]))
    bias = F.embedding(where, WEIGHT).permute(2, 0, 1).unsqueeze(0)
    return ((q @ k.mT) + bias).softmax(-1) @ v


def last_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Decoding: the queries are the last positions."""
    offset = offsets(q.shape[2], k.shape[2]) - (k.shape[2] - q.shape[2])
    return ((q @ k.mT) + WEIGHT[bucket(offset)].permute(2, 0, 1)).softmax(-1) @ v


def clipped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    where = offsets(q.shape[2], k.shape[2]).clamp(-3, 4) + 3
    return ((q @ k.mT) + WEIGHT[where, 0]).softmax(-1) @ v


def causal_as_well(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    offset = offsets(q.shape[2], k.shape[2])
    mask = torch.zeros_like(offset, dtype=q.dtype).masked_fill(offset > 0, -torch.inf)
    bias = WEIGHT[bucket(offset)].permute(2, 0, 1) + mask
    return ((q @ k.mT) + bias).softmax(-1) @ v


def qkv(n_queries: int, n_keys: int) -> list[Tensor]:
    sizes = (n_queries, n_keys, n_keys)
    return [torch.randn(B, H, size, D, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("sizes", [(7, 7), (5, 9), (1, 6), (9, 4)], ids=str)
@pytest.mark.parametrize("function", [t5, last_queries, clipped, causal_as_well])
def test_a_bias_by_distance_is_read_from_a_table(
    function: Callable[..., Tensor], sizes: tuple[int, int]
) -> None:
    (site,) = rewritten_alike(function, *qkv(*sizes))
    assert site.status == "rewritten"
    if 1 not in sizes:
        assert "bias(by distance)" in site.score_transforms
        assert "tensor" not in site.mask


def test_nothing_of_the_size_of_the_scores_is_left() -> None:
    n_tokens = 11
    shapes: list[tuple[int, ...]] = []

    def look(gm: torch.fx.GraphModule, inputs: object) -> object:
        run = backend.rewrite_only(gm, inputs)  # type: ignore[arg-type]
        gm.graph.eliminate_dead_code()
        values = (node.meta.get("example_value") for node in gm.graph.nodes)
        shapes.extend(tuple(value.shape) for value in values if isinstance(value, Tensor))
        return run

    torch.compile(t5, backend=look)(*qkv(n_tokens, n_tokens))
    assert (H, 2 * n_tokens - 1) in shapes
    assert not [shape for shape in shapes if shape[-2:] == (n_tokens, n_tokens)]


def test_sites_share_a_table() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return t5(t5(q, k, v), k, v)

    tables: list[int] = []

    def look(gm: torch.fx.GraphModule, inputs: object) -> object:
        run = backend.rewrite_only(gm, inputs)  # type: ignore[arg-type]
        gm.graph.eliminate_dead_code()
        tables.append(sum(node.target is torch.log for node in gm.graph.nodes))
        tables.append(gm.code.count("aten.log.default"))
        return run

    inputs = qkv(7, 7)
    torch.testing.assert_close(torch.compile(layers, backend=look)(*inputs), layers(*inputs))
    assert [site.status for site in sparse_compile.last_report().sites] == ["rewritten"] * 2
    assert tables == [0, 1]  # the model's own matrices are gone, one table is left


def test_one_table_for_many_lengths() -> None:
    run = torch.compile(t5, backend=backend.rewrite_only, dynamic=True)
    for size in (6, 9, 13):
        inputs = qkv(size, size)
        torch.testing.assert_close(run(*inputs), t5(*inputs))
    (graph,) = sparse_compile.last_report().graphs
    assert "bias(by distance)" in graph.sites[0].score_transforms


def test_a_bias_that_learns_stays_a_tensor() -> None:
    weight = WEIGHT.clone().requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = weight[bucket(offsets(6, 6))].permute(2, 0, 1)
        return ((q @ k.mT) + bias).softmax(-1) @ v

    inputs = qkv(6, 6)
    torch.compile(function, backend=backend.rewrite_only)(*inputs).sum().backward()
    ours, weight.grad = weight.grad, None
    function(*inputs).sum().backward()
    torch.testing.assert_close(ours, weight.grad)
    (site,) = sparse_compile.last_report().sites
    assert "by distance" not in str(site.score_transforms)


def by_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    offset = offsets(q.shape[2], k.shape[2])
    where = (torch.log1p(offset.abs().float()) + torch.arange(q.shape[2])[:, None] % 3).long()
    return ((q @ k.mT) + WEIGHT[where, 0]).softmax(-1) @ v


def by_contents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    where = (torch.log1p(offsets(q.shape[2], k.shape[2]).abs().float()) + q[0, 0, 0, 0] * 0).long()
    return ((q @ k.mT) + WEIGHT[where, 0]).softmax(-1) @ v


@pytest.mark.parametrize("function", [by_position, by_contents])
def test_a_bias_by_more_than_the_distance_stays_a_tensor(function: Callable[..., Tensor]) -> None:
    (site,) = rewritten_alike(function, *qkv(6, 6))
    assert site.status == "rewritten"
    assert "by distance" not in str(site.score_transforms)


def test_the_position_itself_is_a_number() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (((q @ k.mT) + torch.arange(6)) * torch.arange(6)).softmax(-1) @ v

    (site,) = rewritten_alike(function, *qkv(6, 6))
    assert site.status == "rewritten", site.reason


def test_factors_that_are_masks() -> None:
    keep = torch.randn(6, 6) > 0

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.arange(6)[:, None] < torch.arange(6)
        return ((q @ k.mT) * keep * ~future).softmax(-1) @ v

    (site,) = rewritten_alike(function, *qkv(6, 6))
    assert site.status == "rewritten", site.reason
