"""The choice of KV blocks on a GPU: every dtype, head sizes, groups and ways to pool."""

import pytest
import torch

from sparse_compile.kernels import key_ranges, select_kernels, select_top_k
from sparse_compile.testing import in_dtype
from tests.test_range_attention import wrong_order

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# name: (Hkv, group, T, D; k, block_size, block, stride, sinks, local; packed lengths)
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "usual": ((2, 4, 2500, 128), (16, 64, 32, 16, 1, 2), ()),
    "group-1": ((4, 1, 2500, 128), (16, 64, 32, 16, 1, 2), ()),
    "group-12": ((1, 12, 1100, 64), (5, 32, 32, 16, 0, 0), ()),
    "large-heads": ((1, 3, 1500, 256), (12, 64, 32, 16, 1, 2), ()),
    "odd-heads": ((1, 5, 1500, 80), (12, 128, 32, 16, 1, 1), ()),
    "many": ((1, 2, 3000, 32), (64, 16, 64, 16, 2, 3), ()),
    "mean": ((2, 2, 4100, 128), (32, 64, 64, 64, 1, 2), ()),
    "packed": ((2, 2, 1700, 128), (8, 64, 32, 16, 1, 2), (700, 3, 64, 933)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_best_blocks_are_chosen_natively(name: str, dtype: str) -> None:
    (heads, group, n_tokens, dim), sizes, lengths = CASES[name]
    k, block_size, block, stride, sinks, local = sizes
    packed = torch.tensor([0, *lengths], device="cuda").cumsum(0).int() if lengths else None
    where = key_ranges.tokens(n_tokens, n_tokens, packed, torch.device("cuda"))
    n_compressed = int(key_ranges.n_compressed(where.n_keys, block, stride).sum())
    q, k_cmp = (
        torch.randn(1, h, t, dim, device="cuda").to(DTYPES[dtype])
        for h, t in ((heads * group, n_tokens), (heads, n_compressed))
    )
    first, end = key_ranges.compressed(where, block, stride)
    scale = dim**-0.5
    _, lse = torch.ops.sparse_compile.range_attention(
        q, k_cmp, k_cmp, first.int(), end.int(), scale
    )
    chosen = select_top_k.launch(q, k_cmp, lse, *sizes, scale, n_tokens, packed)
    exact = in_dtype([q, k_cmp, lse], torch.float64)
    scores = select_top_k.block_scores(*exact, *sizes[1:4], scale, n_tokens, packed).cpu()
    own = where.position.div(block_size, rounding_mode="floor").cpu()
    found = chosen.cpu()
    assert torch.equal((found >= 0).sum(-1)[0, 0], (own + 1).clamp(max=k))
    ascending = found.masked_fill(found < 0, 2**30)
    assert (ascending.diff(dim=-1) >= 0).all()
    # a head's weights add up to 1 and each counts for `block` tokens: their float32 rounding
    assert wrong_order(scores, found, own, sinks, local).max() < 1e-5 * group
    for as_float64 in (True, False):
        tiles = select_kernels.default_tiles(
            k=k, own_runs=block_size // stride, head_dim=dim, dtype=q.dtype, device=q.device
        )
        again = select_kernels.select(
            q, k_cmp, lse, first, end, own.cuda(), k=k, runs=block // stride,
            own_runs=block_size // stride, sinks=sinks, local=local, scale=scale,
            tiles=tiles._replace(as_float64=as_float64),
        )  # fmt: skip
        assert torch.equal(again, chosen)
