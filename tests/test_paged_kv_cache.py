"""`PagedKVCache` against transformers' own cache: the same tokens, and no page lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from sparse_compile.errors import (
    ConfigError,
    OperatorError,
    OutOfPagesError,
    PageError,
    TooLongError,
)
from tests.paged_models import LONGEST, PROMPT, cache_for, generated, model_of, prompts

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sample": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["llama", "llama-gqa", "gemma3"])
def test_tokens_are_those_of_the_stock_cache(name: str, search: str, padding: int) -> None:
    model, inputs = model_of(name), prompts(padding)
    torch.manual_seed(2)
    wanted = generated(model, inputs, **SEARCHES[search])
    torch.manual_seed(2)
    cache = cache_for(model)
    found = generated(model, inputs, **SEARCHES[search], past_key_values=cache)
    assert torch.equal(found, wanted)
    assert len(set(found[1].tolist())) > 8
    cache.reset()
    assert cache.stats().held == 0


def test_eager_attention_too() -> None:
    model = model_of("llama-gqa", "eager")
    wanted = generated(model, prompts(3))
    assert torch.equal(generated(model, prompts(3), past_key_values=cache_for(model)), wanted)


def test_a_cache_is_used_again_after_a_reset() -> None:
    model, inputs = model_of("llama"), prompts()
    cache = cache_for(model)
    first = generated(model, inputs, past_key_values=cache)
    cache.reset()
    assert torch.equal(generated(model, inputs, past_key_values=cache), first)


def step(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def contents(cache: Any, layer: int) -> list[torch.Tensor]:
    """Keys and values of each row, read by the host's tables."""
    rows = cache._batch.rows
    pool = cache.layers[layer].pool
    found = []
    for table in rows.tables:
        pages = pool[list(table.pages)]  # [pages, Hkv, 2, N, D]
        joined = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)
        found.append(joined[:, :, : table.n_tokens])
    return found


def test_beams_share_pages_and_copy_one_each() -> None:
    model = model_of("llama")
    cache = cache_for(model)
    ids = prompts()["input_ids"][:1].expand(4, -1)
    step(model, ids, cache)
    before = contents(cache, 1)
    cache.reorder_cache(torch.tensor([2, 2, 2, 2]))
    stats = cache.stats()
    assert (stats.held, stats.shared) == (1 + 4, 1)  # 19 tokens: one page full, one not
    for row in contents(cache, 1):
        assert torch.equal(row, before[2])
    step(model, torch.tensor([[3], [4], [5], [6]]), cache)
    after = contents(cache, 1)
    assert all(torch.equal(row[:, :, :PROMPT], before[2]) for row in after)
    assert not torch.equal(after[0][:, :, PROMPT], after[1][:, :, PROMPT])
    assert cache.stats().held == 5


def test_the_device_table_is_the_hosts() -> None:
    model = model_of("llama")
    cache = cache_for(model)
    step(model, prompts()["input_ids"].repeat(2, 1), cache)
    cache.reorder_cache(torch.tensor([1, 0, 3, 3]))
    cache.crop(-4)
    step(model, torch.full((4, 3), 7), cache)
    batch = cache._batch
    for row, table in enumerate(batch.rows.tables):
        listed = batch.block_table[row].tolist()
        assert listed == [*table.pages, *[-1] * (len(listed) - len(table))]
    assert batch.seq_lens.tolist() == [PROMPT - 1] * 4
    assert int(batch.length) == batch.n_tokens == PROMPT - 1


def test_cropping_takes_tokens_back() -> None:
    model, ids = model_of("gemma3"), prompts()["input_ids"]
    cache = cache_for(model)
    step(model, ids, cache)
    wanted = step(model, ids[:, :3], cache)
    cache.crop(-3)
    assert cache.get_seq_length() == PROMPT
    assert torch.equal(step(model, ids[:, :3], cache), wanted)
    for bad in (1, -100):
        with pytest.raises(PageError, match="tokens_to_remove"):
            cache.crop(bad)


def test_cropped_rows_do_not_write_shared_pages() -> None:
    """Rows that were forked at a full page, and cropped back into it."""
    model = model_of("llama")
    cache = cache_for(model)
    step(model, prompts()["input_ids"][:1, :16].expand(2, -1), cache)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert cache.stats().held == 1
    cache.crop(-2)
    assert cache.stats().held == 2
    before = contents(cache, 0)
    step(model, torch.tensor([[3], [4]]), cache)
    after = contents(cache, 0)
    assert torch.equal(after[0][:, :, :14], before[0])
    assert not torch.equal(after[0][:, :, 14], after[1][:, :, 14])


def test_rows_are_repeated_and_chosen() -> None:
    model, ids = model_of("llama"), prompts()["input_ids"]
    cache = cache_for(model, n_pages=12)
    step(model, ids, cache)
    first, second = contents(cache, 0)
    cache.batch_repeat_interleave(2)
    found = contents(cache, 0)
    assert all(map(torch.equal, found, (first, first, second, second)))
    cache.batch_select_indices(torch.tensor([False, False, True, False]))
    assert torch.equal(contents(cache, 0)[0], second)
    step(model, ids[:1, :2], cache)
    assert cache.get_seq_length() == PROMPT + 2


def test_assisted_decoding() -> None:
    model, inputs = model_of("llama"), prompts()
    inputs = {name: value[1:] for name, value in inputs.items()}
    wanted = generated(model, inputs)
    found = generated(model, inputs, past_key_values=cache_for(model), prompt_lookup_num_tokens=3)
    assert torch.equal(found, wanted)


def test_out_of_pages_leaves_everything_as_it_was() -> None:
    model, ids = model_of("llama"), prompts()["input_ids"]
    cache = cache_for(model, n_pages=4)
    step(model, ids[:, :16], cache)
    wanted = step(model, ids[:, :16], cache)
    before, batch = [*contents(cache, 0), *contents(cache, 1)], cache._batch
    tables = [table.pages for table in batch.rows.tables]
    for _ in range(2):
        with pytest.raises(OutOfPagesError, match="2 pages were asked for, and 0 of 4"):
            step(model, ids[:, :1], cache)
        assert [table.pages for table in batch.rows.tables] == tables
        assert batch.seq_lens.tolist() == [32, 32]
        after = [*contents(cache, 0), *contents(cache, 1)]
        assert all(map(torch.equal, before, after))
    cache.crop(-16)
    assert torch.equal(step(model, ids[:, :16], cache), wanted)
    cache.reset()
    assert cache.stats().free == 4


def test_beams_without_a_page_to_copy_to_stay_as_they_were() -> None:
    model, ids = model_of("llama"), prompts()["input_ids"]
    cache = cache_for(model, n_pages=4)
    step(model, ids[:, :17], cache)
    cache.reorder_cache(torch.tensor([1, 1]))  # the other row's pages are given back for the copy
    assert cache.stats().held == 3
    cache.reorder_cache(torch.tensor([1, 0]))
    tables = [table.pages for table in cache._batch.rows.tables]
    with pytest.raises(OutOfPagesError):
        cache.batch_repeat_interleave(3)
    assert [table.pages for table in cache._batch.rows.tables] == tables
    step(model, ids[:, :1], cache)


def test_too_long_is_refused() -> None:
    model, ids = model_of("llama"), prompts()["input_ids"]
    cache = cache_for(model, max_length=20)
    step(model, ids, cache)
    with pytest.raises(TooLongError, match="at most 20, which is max_length"):
        step(model, ids[:, :2], cache)
    step(model, ids[:, :1], cache)
    with pytest.raises(TooLongError, match="the size of the pool"):
        step(model, ids, cache_for(model, n_pages=1))


def test_bad_input_gets_typed_errors() -> None:
    model, ids = model_of("llama"), prompts()["input_ids"]
    cache = cache_for(model)
    with pytest.raises(OperatorError, match="requires grad"):
        model(input_ids=ids, past_key_values=cache)
    step(model, ids, cache)
    with pytest.raises(OperatorError, match="key_states has 3 rows"):
        step(model, ids[:1].expand(3, -1), cache)
    for options in ({"page_size": 20}, {"max_length": 0}):
        with pytest.raises(PageError, match="page_size is"):
            cache_for(model, **options)
    config = LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ConfigError, match="linear_attention"):
        cache_for(type("Model", (), {"config": config}))


def test_sizes_and_lengths() -> None:
    model = model_of("gemma3")
    cache = cache_for(model)
    assert (cache.get_seq_length(), cache.get_max_length()) == (0, LONGEST)
    assert cache.is_sliding == [True, False]
    assert cache.is_croppable
    step(model, prompts()["input_ids"], cache)
    assert cache.get_seq_length() == PROMPT
    assert cache.get_mask_sizes(2, 0) == (PROMPT + 2, 0)
