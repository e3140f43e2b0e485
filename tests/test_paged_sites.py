"""Compiled models with `PagedKVCache`: the gather disappears, tokens stay, nothing is compiled twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import sparse_compile
from sparse_compile import backend
from tests.paged_models import LONGEST, cache_for, generated, model_of, prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compiled(model: PreTrainedModel, n_rows: int, sketch: bool = False, **options: Any) -> Any:
    """Compile a model's forward pass; an empty cache whose pools exist already."""
    cache = cache_for(model, sketch=sketch)
    config = model.config
    cache.early_initialization(
        n_rows, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu")
    )
    model.forward = torch.compile(
        model.forward, backend=backend.rewrite_only, fullgraph=True,
        options={"verify": True} | options,
    )  # fmt: skip
    return cache


@pytest.mark.parametrize(
    ("name", "attention", "beams"),
    [("llama", "sdpa", 1), ("llama-gqa", "eager", 2), ("gemma3", "sdpa", 2)],
)
def test_tokens_are_those_of_the_stock_cache(name: str, attention: str, beams: int) -> None:
    model, inputs = model_of(name, attention), prompts(5)
    wanted = generated(model, inputs, num_beams=beams)
    cache = compiled(model, 2 * beams)
    found = generated(model, inputs, num_beams=beams, past_key_values=cache)
    assert torch.equal(found, wanted)
    report = sparse_compile.last_report()
    assert not report.errors
    assert len(report.graphs) == 2  # the prompt, and all tokens after it
    assert [(site.kernel, site.kv_source) for site in report.sites] == [
        ("paged_attention", "paged")
    ] * 4
    for site in report.sites:
        assert site.validation is not None
        assert site.validation.startswith("passed")


def attend(q: torch.Tensor, pages: list[torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
    k, v = torch.ops.sparse_compile.paged_gather(*pages, 32)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_masks_that_reach_behind_the_end_keep_the_gather(shift: int) -> None:
    """Query `t` at `length + t` may read up to itself; a mask that lets it read on is not proven."""

    def function(q: torch.Tensor, pool: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        table = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)
        places = torch.arange(3)[:, None] + length
        length.add_(3)
        keep = torch.arange(32) <= places + shift
        lens = torch.zeros(2, dtype=torch.int32).copy_(length)
        return attend(q, [pool, table, lens], keep)

    q, pool = torch.randn(2, 4, 3, 8), torch.randn(4, 4, 2, 16, 8)
    length = torch.tensor(20)
    wanted = function(q, pool, length.clone())
    found = torch.compile(function, backend=backend.rewrite_only)(q, pool, length.clone())
    torch.testing.assert_close(found, wanted)
    (site,) = sparse_compile.last_report().sites
    assert site.kv_source == "paged"
    assert (site.kernel == "paged_attention") == (shift <= 0)
    assert ("paged-mask" in site.why) == (shift > 0)


def sparse(name: str, attention: str, padding: int, **options: Any) -> tuple[Any, Any, Any]:
    """Tokens, those of the stock cache, and what became of the sites when they decode."""
    model, inputs = model_of(name, attention), prompts(padding)
    wanted = generated(model, inputs)
    cache = compiled(model, 2, sketch=options.pop("sketch", True), **options)
    found = generated(model, inputs, past_key_values=cache)
    report = sparse_compile.last_report()
    assert not report.errors
    for site in report.graphs[0].sites:  # the prompt
        assert (site.kernel, site.policy) == ("paged_attention", "exact")
        assert site.not_policy_code == "many-queries"
    for site in report.sites:
        assert site.validation is not None
        assert site.validation.startswith("passed")
    return found, wanted, report.graphs[1].sites


@pytest.mark.parametrize(
    ("name", "attention", "padding"), [("llama-gqa", "eager", 5), ("gemma3", "sdpa", 0)]
)
def test_all_of_the_mass_gives_the_tokens_of_the_stock_cache(
    name: str, attention: str, padding: int
) -> None:
    found, wanted, sites = sparse(name, attention, padding, policy="top_p", p=1.0)
    assert torch.equal(found, wanted)
    for site in sites:
        assert (site.kernel, site.policy) == ("progressive_attention", "top_p")
        assert site.validation.endswith("with all pages read")
        assert "until 1.0 is verified" in site.why


def test_a_budget_of_pages_is_another_function() -> None:
    found, wanted, sites = sparse("llama", "sdpa", 0, policy="top_k", k=1, block_size=16)
    assert not torch.equal(found, wanted)
    assert [(site.kernel, site.policy) for site in sites] == [
        ("progressive_attention", "top_k")
    ] * 2
    assert all("the 1 pages of 16 keys" in site.why for site in sites)


def test_without_a_sketch_all_pages_are_read() -> None:
    found, wanted, sites = sparse("llama", "sdpa", 0, policy="top_p", p=0.5, sketch=False)
    assert torch.equal(found, wanted)
    assert [(site.kernel, site.not_policy_code) for site in sites] == [
        ("paged_attention", "no-sketch")
    ] * 2


def test_top_p_of_a_site_without_pages_is_exact() -> None:
    def function(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 40, 8)
    found = torch.compile(function, backend=backend.rewrite_only, options={"policy": "top_p"})(q, k)
    torch.testing.assert_close(found, function(q, k))
    (site,) = sparse_compile.last_report().sites
    assert (site.policy, site.not_policy_code) == ("exact", "no-pages")


def test_the_shortest_sites_stay_exact() -> None:
    _, _, sites = sparse("llama", "sdpa", 0, policy="top_p", min_tokens=LONGEST + 1)
    assert [site.not_policy_code for site in sites] == ["min-tokens"] * 2
