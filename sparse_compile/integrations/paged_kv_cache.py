"""A transformers cache that keeps keys and values in pages.

`update` writes new tokens into the layer's pages and gives back what `paged_gather` reads from them.
That is right on its own; in a model compiled with our backend the gather disappears, and the attention
reads the pages itself.

All layers share one block table, also those with a sliding window: they keep all their tokens, and
their kernels read only the pages inside of the window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_compile import ops
from sparse_compile.errors import OperatorError, PageError
from sparse_compile.integrations.hf_compat import (
    Cache,
    CacheLayerMixin,
    layer_without_kv,
    stored_layers,
)
from sparse_compile.kernels.paged_checks import PAGE_SIZES
from sparse_compile.ops_paged import refuse_gradients
from sparse_compile.runtime import reserve_op
from sparse_compile.runtime.block_pool import BlockPool, PoolStats
from sparse_compile.runtime.paged_rows import PagedRows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class PagedKVCache(Cache):
    """Keys and values in pages for `model.generate(input_ids, past_key_values=PagedKVCache(...))`.

    Greedy search, sampling and beam search (beams share pages; at most one page is copied for each
    beam that begins to differ), left padding, `crop` and assisted decoding. A sequence may get
    as long as `max_length`; its pages are taken when it needs them.

    Compile the model's forward pass, not the cache: `model.forward = torch.compile(model.forward,
    backend="sparse_compile")`. Shapes do not depend on how long sequences are, so that decoding is
    compiled once. A compiled first pass needs pools that exist: call `early_initialization`, else
    its graph breaks there.

    Args:
        config: Of the model.
        max_length: Most tokens of a sequence, prompt included.
        page_size: Tokens of a page: 16, 32 or 64.
        n_pages: Pages of each layer's pool; enough for every row to reach `max_length` if left out.
        sketch: Keep an INT4 sketch of the keys, an eighth of float16 keys and values more: with the
            policy `top_p` a compiled model then reads only some of the pages when it decodes.

    Raises:
        ConfigError: The model keeps something else than keys and values of tokens.
        PageError: A number is out of its range.
    """

    def __init__(
        self, config: PreTrainedConfig, *, max_length: int, page_size: int = 16,
        n_pages: int | None = None, sketch: bool = False,
    ) -> None:  # fmt: skip
        """A cache without tokens; memory is taken at the first update."""
        if page_size not in PAGE_SIZES or max_length < 1:
            listed = ", ".join(map(str, PAGE_SIZES))
            raise PageError(
                f"page_size is {page_size} and max_length {max_length}.\n"
                f"  Expected a page_size out of {listed}, and at least one token.\n"
                "  Pages of 16 tokens waste the least."
            )
        self._page_size, self._max_length, self._n_pages = page_size, max_length, n_pages
        self.has_sketch = sketch
        self._batch: _Batch | None = None
        self._is_static = False  # a pass was compiled: every pass reads as many positions
        kinds = stored_layers(config)
        first = next((number for number, kind in enumerate(kinds) if kind is not None), 0)
        layers = [
            layer_without_kv() if kind is None else PagedLayer(self, kind == "sliding", i == first)
            for i, kind in enumerate(kinds)
        ]
        super().__init__(layers=layers)

    def batch_of(self, n_rows: int, device: torch.device) -> _Batch:
        """The rows of the batch, made when they are first needed."""
        if self._batch is None:
            per_row = -(-self._max_length // self._page_size)
            block_pool = BlockPool(self._n_pages or n_rows * per_row)
            self._batch = _Batch(
                PagedRows(
                    block_pool, n_rows=n_rows, page_size=self._page_size,
                    max_length=self._max_length, device=device,
                )
            )  # fmt: skip
        return self._batch

    @property
    def is_compileable(self) -> bool:
        """Whether a mask may not be left out: inside of a compiled pass.

        Outside it says no, so that `generate` leaves masks to the model: a mask that the model
        makes is proven, and one that is handed in is not.
        """
        return torch.compiler.is_compiling()

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens so far; a tensor in a compiled pass, where a number would be compiled into it."""
        if self._batch is None:
            return 0
        return self._batch.length if torch.compiler.is_compiling() else self._batch.n_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many keys `update` gives back, and the first one's position."""
        return self.n_keys(query_length), 0

    def n_keys(self, n_new: int) -> int:
        """How many positions are read when `n_new` tokens have been added.

        A compiled pass reads all that the block table has room for, whatever there is: a constant. What
        of such a pass runs uncompiled does the same.
        """
        if torch.compiler.is_compiling():
            self._is_static = True
        elif not self._is_static:
            return n_new if self._batch is None else self._batch.n_tokens + n_new
        return -(-self._max_length // self._page_size) * self._page_size

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Most tokens of a sequence."""
        return self._max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` continue row `beam_idx[i]`; rows that come from one share its pages.

        Raises:
            OutOfPagesError: There is no page left for a last page that beams would both write;
                nothing was changed.
        """
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; one may be kept more than once. Raises as `reorder_cache`."""
        if self._batch is not None:
            n_rows = len(self._batch.rows.tables)
            self._batch.arrange(torch.arange(n_rows)[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row become `repeats` rows that share its pages. Raises as `reorder_cache`."""
        if self._batch is not None:
            n_rows = len(self._batch.rows.tables)
            self._batch.arrange([row for row in range(n_rows) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens of every row away.

        Raises:
            PageError: The number is positive, or there are fewer tokens.
            OutOfPagesError: Rows share a page that they are going to write, and no page is left for
                a copy. In both cases nothing was changed.
        """
        n_tokens = 0 if self._batch is None else self._batch.n_tokens
        if not -n_tokens <= tokens_to_remove <= 0:
            raise PageError(
                f"tokens_to_remove is {tokens_to_remove}, with {n_tokens} tokens in the cache.\n"
                f"  Expected a number from {-n_tokens} to 0.\n"
                "  Write -3 to take the last three tokens away."
            )
        if self._batch is not None and tokens_to_remove:
            rows = range(len(self._batch.rows.tables))
            self._batch.arrange(list(rows), n_tokens + tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens and give their pages back; pools and block table stay where they are."""
        if self._batch is not None:
            self._batch.arrange(list(range(len(self._batch.rows.tables))), 0)

    def stats(self) -> PoolStats | None:
        """How the pages are used; None before the first update."""
        return None if self._batch is None else self._batch.rows.block_pool.stats()


class _Batch:
    """The rows of a cache, which all have the same number of tokens, and the device's copy of that."""

    def __init__(self, rows: PagedRows) -> None:
        self.rows = rows
        self._set_up()

    def _set_up(self) -> None:
        self.block_table = self.rows.block_table
        self.length = torch.tensor(0, device=self.block_table.device)
        n_rows = self.block_table.shape[0]
        self.seq_lens = self.block_table.new_zeros(n_rows)
        self.handle = reserve_op.handle_of(self.rows)
        for tensor in (self.block_table, self.length, self.seq_lens):
            torch._dynamo.mark_static_address(tensor)

    @property
    def n_tokens(self) -> int:
        """What the host knows of `length`."""
        return self.rows.tables[0].n_tokens

    def begin(self, n_new: int) -> None:
        """Make room for the tokens of a pass, before the first layer writes them."""
        torch.ops.sparse_compile.paged_reserve(self.block_table, self.handle, n_new)
        self.length.add_(n_new)
        self.seq_lens.copy_(self.length)

    def arrange(self, order: list[int], n_tokens: int | None = None) -> None:
        """Make new rows out of the old ones; see `PagedRows.arrange`."""
        if n_tokens is None and order == list(range(len(self.rows.tables))):
            return
        self.rows.arrange(order, n_tokens)
        n_tokens = self.n_tokens
        if self.block_table is not self.rows.block_table:
            self._set_up()
        self.length.fill_(n_tokens)
        self.seq_lens.fill_(n_tokens)


class PagedLayer(CacheLayerMixin):
    """The pages of one layer."""

    is_croppable = True

    def __init__(self, cache: PagedKVCache, is_sliding: bool, is_first: bool) -> None:
        """A layer without memory."""
        super().__init__()
        self.is_sliding = is_sliding
        self._is_first = is_first  # of the layers that a pass updates
        self._cache = cache

    @torch.compiler.disable(reason="call early_initialization to compile the first pass whole")
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for the layer's pool.

        Raises:
            OperatorError: Keys and values have different head sizes.
        """
        n_rows, heads, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise OperatorError(
                f"keys have {head_dim} channels, values {value_states.shape[-1]}. Expected as many: "
                "use DynamicCache for this model."
            )
        self._batch = self._cache.batch_of(n_rows, key_states.device)
        rows = self._batch.rows
        n_pages = rows.block_pool.n_pages
        self.pool = key_states.new_zeros((n_pages, heads, 2, rows.page_size, head_dim))
        self.sketch = None
        if self._cache.has_sketch:
            self.sketch = ops.Sketch.empty(self.pool)
        for tensor in (self.pool, *(self.sketch or ())):
            torch._dynamo.mark_static_address(tensor)
            rows.pools.append(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens into the pages, and read all of them back.

        Returns:
            Keys and values, [B, Hkv, S, D] each.
        Raises:
            OutOfPagesError: The pool has too few pages left; nothing was changed.
            TooLongError: Sequences would get longer than `max_length`; nothing was changed.
            OperatorError: The batch has another number of rows, or grad mode is on.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch = self._batch
        if self._is_first:
            n_rows = batch.block_table.shape[0]
            if key_states.shape[0] != n_rows:
                raise OperatorError(
                    f"key_states has {key_states.shape[0]} rows. Expected {n_rows}, as before; "
                    "make a cache for each batch size."
                )
            refuse_gradients(key_states=key_states, value_states=value_states)
            batch.begin(key_states.shape[2])
        where = (self.pool, batch.block_table, batch.seq_lens)
        ops.paged_append(key_states, value_states, *where, sketch=self.sketch)
        return ops.paged_gather(*where, n_keys=self._cache.n_keys(0), sketch=self.sketch)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` gives back, and the first one's position."""
        return self._cache.n_keys(query_length), 0

    def get_seq_length(self) -> int | Tensor:
        """Tokens so far."""
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        """Most tokens of a sequence."""
        return self._cache.get_max_length()
