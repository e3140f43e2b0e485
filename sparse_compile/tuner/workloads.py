"""How each tuned kernel is called: inputs, the launcher, and the reference it must agree with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparse_compile import expressions as ex
from sparse_compile.ir import ScoreProgram
from sparse_compile.kernels import key_ranges
from sparse_compile.kernels.block_sparse import block_sparse_attention_ref
from sparse_compile.kernels.range_attention import range_attention_ref
from sparse_compile.kernels.select_top_k import block_scores, choose
from sparse_compile.kernels.selected_attention import selected_attention_ref

if TYPE_CHECKING:
    from sparse_compile.tuner.shapes import Shape

BLOCK, STRIDE = 32, 16  # of compressed keys, as in NSA
SINKS, LOCAL = 1, 2
TILE, LIST_BLOCK = 128, 128  # of lists of KV blocks, as the compiler makes them
PAGE_SIZE = 16
PROMISED = 0.95  # of the mass


class Problem(NamedTuple):
    """One call of a kernel."""

    run: Callable[[], tuple[Tensor, ...]]  # by the launcher
    truth: Callable[[], tuple[Tensor, ...]]  # by the reference, in float64
    view: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]  # what of the results is compared


class Workload(NamedTuple):
    """A kernel that can be tuned."""

    tuned: Callable[[], Any]  # the `Tuned` that its launcher asks
    facts: Callable[[Shape], dict[str, int]]
    make: Callable[[Shape, torch.dtype, torch.device], Problem]
    check_tokens: int = 528  # of the problem that is compared with the reference: no whole tiles


def _heads(
    shape: Shape, dtype: torch.dtype, device: torch.device, keys: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    keys = shape.keys if keys is None else keys
    sizes = (
        (shape.query_heads, shape.tokens, shape.head_dim),
        (shape.kv_heads, keys, shape.head_dim),
        (shape.kv_heads, keys, shape.value_dim),
    )
    q, k, v = (torch.randn(shape.batch, *size, device=device).to(dtype) for size in sizes)
    return q, k, v


def _same(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results


def _gradients(reference: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...],
               grad: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """dQ, dK and dV of a reference in float64, where `grad` is that of the output."""
    wide = [x.double().requires_grad_() for x in inputs]
    out, _ = reference(*wide)
    return torch.autograd.grad(out, wide, grad.double())


# windows and compressed keys


def _range_facts(shape: Shape) -> dict[str, int]:
    return {"head_dim": shape.head_dim, "value_dim": shape.value_dim, "n_tokens": shape.tokens}


def _window(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    where = key_ranges.tokens(shape.tokens, shape.keys, None, device)
    first, end = key_ranges.window(where, shape.window)
    return first.int(), end.int()


def _range_forward(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    from sparse_compile.kernels import range_kernels

    heads = _heads(shape, dtype, device)
    ranges, scale = _window(shape, device), shape.head_dim**-0.5
    return Problem(
        lambda: range_kernels.forward(*heads, *ranges, scale),
        lambda: range_attention_ref(*(x.double() for x in heads), *ranges, scale),
        _same,
    )


def _range_backward(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    from sparse_compile.kernels import range_kernels

    heads = _heads(shape, dtype, device)
    ranges, scale = _window(shape, device), shape.head_dim**-0.5
    out, lse = range_kernels.forward(*heads, *ranges, scale)
    grad = torch.randn_like(out)

    def truth() -> tuple[Tensor, ...]:
        def reference(*wide: Tensor) -> tuple[Tensor, Tensor]:
            return range_attention_ref(*wide, *ranges, scale)

        return _gradients(reference, heads, grad)

    return Problem(
        lambda: range_kernels.backward(grad, None, *heads, out, lse, *ranges, scale), truth, _same
    )


# lists of KV blocks


def _block_sparse_facts(shape: Shape) -> dict[str, int]:
    return {
        "head_dim": shape.head_dim, "value_dim": shape.value_dim, "tile": TILE,
        "block_size": LIST_BLOCK, "scored": 0,
    }  # fmt: skip


class _Causal(NamedTuple):
    """Causal attention by lists of KV blocks, as the compiler lowers it."""

    heads: tuple[Tensor, ...]
    program: ScoreProgram
    lists: tuple[Tensor, ...]

    def arguments(self) -> tuple[Any, ...]:
        return (*self.heads, *self.lists, [], self.program.encode(), TILE, LIST_BLOCK)

    def reference(self, *heads: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention_ref(*heads, *self.lists, [], self.program, TILE, LIST_BLOCK)


def _causal(shape: Shape, dtype: torch.dtype, device: torch.device) -> _Causal:
    heads = _heads(shape, dtype, device)
    program = ScoreProgram(
        scale=shape.head_dim**-0.5, keep=ex.s <= ex.t + shape.keys - shape.tokens
    )
    sizes = (program.encode(), TILE, LIST_BLOCK, None)
    lists = torch.ops.sparse_compile.list_blocks_v1(*heads[:2], [], *sizes)
    return _Causal(heads, program, lists)


def _block_sparse_forward(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    from sparse_compile.kernels import block_sparse_forward

    one = _causal(shape, dtype, device)
    return Problem(
        lambda: block_sparse_forward.forward(*one.arguments()),
        lambda: one.reference(*(x.double() for x in one.heads)),
        _same,
    )


def _block_sparse_backward(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    from sparse_compile.kernels import block_sparse_backward, block_sparse_forward

    one = _causal(shape, dtype, device)
    *before, program, tile, block_size = one.arguments()
    out, lse = block_sparse_forward.forward(*one.arguments())
    grad = torch.randn_like(out)

    def run() -> tuple[Tensor, ...]:
        args = (*before, out, lse, program, tile, block_size)
        return block_sparse_backward.backward(grad, None, *args)[:3]

    return Problem(run, lambda: _gradients(one.reference, one.heads, grad), _same)


# the choice of KV blocks


def _select_facts(shape: Shape) -> dict[str, int]:
    return {
        "head_dim": shape.head_dim, "k": shape.slots, "own_runs": shape.block_size // STRIDE
    }  # fmt: skip


def _select(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    from sparse_compile.kernels import range_kernels, select_top_k

    n_compressed = max(0, (shape.keys - BLOCK) // STRIDE + 1)
    q, k, v = _heads(shape, dtype, device, n_compressed)
    scale = shape.head_dim**-0.5
    where = key_ranges.tokens(shape.tokens, shape.keys, None, device)
    first, end = (x.int() for x in key_ranges.compressed(where, BLOCK, STRIDE))
    _, lse = range_kernels.forward(q, k, v, first, end, scale)
    sizes = (shape.block_size, BLOCK, STRIDE)
    own = where.position // shape.block_size

    def run() -> tuple[Tensor, ...]:
        args = (shape.slots, *sizes, SINKS, LOCAL, scale, shape.keys, None)
        return (select_top_k.launch(q, k, lse, *args),)

    def scores() -> Tensor:
        wide = (x.double() for x in (q, k, lse))
        return block_scores(*wide, *sizes, scale, shape.keys)

    def truth() -> tuple[Tensor, ...]:
        return (choose(scores(), own, shape.slots, SINKS, LOCAL),)

    def view(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # lists of equal worth are equally right: their scores, the forced, and their order count
        (lists,) = results
        there = lists >= 0
        at = lists.long().clamp(min=0)
        forced = ((at < SINKS) | (at > own[:, None] - LOCAL)) & there
        worth = scores().gather(3, at).masked_fill(~there | forced, 0.0).sum(-1, keepdim=True)
        ascends = (lists[..., 1:] > lists[..., :-1]) | ~there[..., 1:]
        counts = [(x & there[..., : x.shape[3]]).sum(-1) for x in (there, forced, ascends)]
        return worth, torch.stack(counts, -1).double()

    return Problem(run, truth, view)


# selected attention


def _selected_facts(shape: Shape) -> dict[str, int]:
    return {
        "head_dim": shape.head_dim, "value_dim": shape.value_dim,
        "block_size": shape.block_size, "group": shape.group, "n_tokens": shape.tokens,
    }  # fmt: skip


def selection(shape: Shape, device: torch.device) -> Tensor:
    """Random lists with the first KV block, the own and the one before, int32 [B, Hkv, T, K]."""
    n_blocks = -(-shape.keys // shape.block_size)
    block = torch.arange(n_blocks, device=device)
    position = torch.arange(shape.tokens, device=device) + (shape.keys - shape.tokens)
    own = (position // shape.block_size)[:, None]
    forced = (block == 0) | (block == own) | (block == own - 1)
    rows = []
    for _ in range(shape.batch * shape.kv_heads):  # one at a time: all need much memory at once
        order = torch.rand(shape.tokens, n_blocks, device=device).masked_fill(forced, 2.0)
        order = order.masked_fill(block > own, -1.0)
        value, chosen = order.topk(min(shape.slots, n_blocks), dim=-1)
        rows.append(chosen.masked_fill(value < 0, n_blocks).sort(-1).values)
    lists = torch.stack(rows).unflatten(0, (shape.batch, shape.kv_heads))
    lists = torch.nn.functional.pad(lists, (0, shape.slots - lists.shape[3]), value=n_blocks)
    return lists.masked_fill(lists == n_blocks, -1).int()


def _selected_forward(loop_order: str) -> Callable[[Shape, torch.dtype, torch.device], Problem]:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
        from sparse_compile.kernels import selected_attention

        heads, lists = _heads(shape, dtype, device), selection(shape, device)
        args = (shape.block_size, shape.head_dim**-0.5, True, None)
        return Problem(
            lambda: selected_attention.launch(*heads, lists, *args, loop_order),
            lambda: selected_attention_ref(*(x.double() for x in heads), lists, *args),
            _same,
        )

    return make


def _selected_backward(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    from sparse_compile.kernels import selected_attention

    heads, lists = _heads(shape, dtype, device), selection(shape, device)
    args = (shape.block_size, shape.head_dim**-0.5, True, None)
    out, lse = selected_attention.launch(*heads, lists, *args, "kv_major")
    grad = torch.randn_like(out)

    def run() -> tuple[Tensor, ...]:
        return selected_attention.launch_backward(grad, None, *heads, lists, out, lse, *args)

    def truth() -> tuple[Tensor, ...]:
        def reference(*wide: Tensor) -> tuple[Tensor, Tensor]:
            return selected_attention_ref(*wide, lists, *args)

        return _gradients(reference, heads, grad)

    return Problem(run, truth, _same)


# keys and values in pages


def _paged_facts(shape: Shape) -> dict[str, int]:
    from sparse_compile.kernels.paged_attention_kernel import rows_of

    rows = rows_of(shape.tokens, shape.group)
    return {"head_dim": shape.head_dim, "page_size": PAGE_SIZE, "rows": rows}


def _paged(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    from sparse_compile.kernels import paged_attention

    n_entries = -(-shape.keys // PAGE_SIZE)
    n_pages = shape.batch * n_entries
    sizes = (n_pages, shape.kv_heads, 2, PAGE_SIZE, shape.head_dim)
    pool = torch.randn(sizes, device=device).to(dtype)
    table = torch.randperm(n_pages, device=device).int().view(shape.batch, n_entries)
    lengths = torch.full((shape.batch,), shape.keys, dtype=torch.int32, device=device)
    q = torch.randn(shape.batch, shape.query_heads, shape.tokens, shape.head_dim, device=device)
    q, program = q.to(dtype), ScoreProgram(scale=shape.head_dim**-0.5)
    rest = (table, lengths, None, [])
    return Problem(
        lambda: paged_attention.launch(q, pool, *rest, program.encode(), True, 0),
        lambda: paged_attention.paged_attention_ref(
            q.double(), pool.double(), *rest, program, True, 0
        ),
        _same,
    )


def _progressive_facts(shape: Shape) -> dict[str, int]:
    from sparse_compile.kernels.progressive_kernels import rows_of

    rows = rows_of(shape.group)
    return {"head_dim": shape.head_dim, "page_size": PAGE_SIZE, "rows": rows}


def _progressive(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    from sparse_compile.kernels import progressive_attention
    from sparse_compile.kernels.paged_cache import sketch_ref

    n_entries = -(-shape.keys // PAGE_SIZE)
    sizes = (shape.batch * n_entries, shape.kv_heads, 2, PAGE_SIZE, shape.head_dim)
    pool = torch.randn(sizes, device=device)
    # a tenth of the pages are near one direction, and so are the queries
    pool[torch.rand(len(pool), device=device) < 0.1, :, 0] += 1.0
    pool = pool.to(dtype)
    table = torch.randperm(len(pool), device=device).int().view(shape.batch, n_entries)
    lengths = torch.full((shape.batch,), shape.keys, dtype=torch.int32, device=device)
    q = 1.0 + torch.randn(shape.batch, shape.query_heads, 1, shape.head_dim, device=device)
    q, program = q.to(dtype), ScoreProgram(scale=shape.head_dim**-0.5)
    given = (*sketch_ref(pool[:, :, 0]), table, lengths, [], program.encode())
    options = (PROMISED, None, 0, SINKS, LOCAL, 0, 0)

    def view(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # where sums are at the edge, a page more or less is equally right
        out, _, mass, n_pages, pages = results
        exact, _ = progressive_attention.progressive_attention_ref(
            q.double(), pool.double(), table, lengths, [], program, 0, pages, n_pages
        )
        off = (out - exact).norm(dim=-1, keepdim=True) / exact.norm(dim=-1, keepdim=True)
        return 1.0 + off, (mass >= PROMISED).double()

    return Problem(
        lambda: progressive_attention.launch(q, pool, *given, *options),
        lambda: progressive_attention.forward_cpu(q.double(), pool.double(), *given, *options),
        view,
    )


def _tuned(module: str, name: str) -> Callable[[], Any]:
    def load() -> Any:
        import importlib

        return getattr(importlib.import_module(f"sparse_compile.kernels.{module}"), name)

    return load


def _selected(module: str, name: str, loop_order: str) -> Workload:
    return Workload(_tuned(module, name), _selected_facts, _selected_forward(loop_order))


def _block_sparse(tuned: Callable[[], Any],
                  make: Callable[[Shape, torch.dtype, torch.device], Problem]) -> Workload:  # fmt: skip
    # as the sizes that are timed: whole KV blocks, and sixteen of them, are in the code of a kernel
    return Workload(tuned, _block_sparse_facts, make, check_tokens=16 * LIST_BLOCK)


def _block_sparse_gradient(name: str) -> Workload:
    tuned = _tuned("block_sparse_backward", name)
    return _block_sparse(tuned, _block_sparse_backward)


def _range_part(name: str, make: Callable[[Shape, torch.dtype, torch.device], Problem]) -> Workload:
    return Workload(_tuned("range_kernels", name), _range_facts, make)


WORKLOADS: dict[str, Workload] = {
    "block_sparse_forward": _block_sparse(
        _tuned("block_sparse_forward", "FORWARD"), _block_sparse_forward
    ),
    "block_sparse_query_gradient": _block_sparse_gradient("QUERY_GRADIENT"),
    "block_sparse_key_gradient": _block_sparse_gradient("KEY_GRADIENT"),
    "paged_attention": Workload(_tuned("paged_attention_kernel", "PAGED"), _paged_facts, _paged),
    "progressive_attention": Workload(
        _tuned("progressive_kernels", "PROGRESSIVE"), _progressive_facts, _progressive
    ),
    "range_forward": _range_part("FORWARD", _range_forward),
    "range_query_gradient": _range_part("QUERY_GRADIENT", _range_backward),
    "range_key_gradient": _range_part("KEY_GRADIENT", _range_backward),
    "select_top_k": Workload(_tuned("select_kernels", "SELECT"), _select_facts, _select),
    "selected_query_major": _selected("selected_query_major", "QUERY_MAJOR", "query_major"),
    "selected_kv_major": _selected("selected_kv_major", "KV_MAJOR", "kv_major"),
    "selected_tile_union": _selected("selected_tile_union", "TILE_UNION", "tile_union"),
    "selected_backward": Workload(
        _tuned("selected_backward", "BACKWARD"), _selected_facts, _selected_backward
    ),
}
