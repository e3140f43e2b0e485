"""Chooses what replaces a site, and says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor

from sparse_compile import _compat, costs, rates, winners
from sparse_compile import expressions as ex
from sparse_compile.cost_formulas import DENSE, TILE_SHARED, TILE_TOKENS
from sparse_compile.costs import Overlap, Problem
from sparse_compile.expressions import Load
from sparse_compile.ir import KernelPlan, Reason
from sparse_compile.kernels import block_sparse
from sparse_compile.kernels.selected_attention import LOOP_ORDERS
from sparse_compile.kernels.triton_text import unprintable
from sparse_compile.passes.lower_flex import flex_supported

if TYPE_CHECKING:
    from sparse_compile.passes.paged_sites import Paged
    from sparse_compile.passes.programs import Proven

Size = int | torch.SymInt | sympy.Expr
FUSED_GQA = (torch.float16, torch.bfloat16)  # dtypes whose fused CUDA kernels take fewer KV heads


def plan(proven: Proven, *, device: torch.device, training: bool) -> KernelPlan:
    """The kernel for a site under the policy `exact`.

    A mask that is proven never becomes a [T, S] tensor; a bias that stays a tensor is handed to
    PyTorch's fused attention as it is.
    """
    program = proven.program
    plain = program.sink is None and program.weight is None
    if plain and not (program.score - ex.x).has(ex.x):
        found = _plan_fused(proven, device)
        if found is not None:
            return _kept(proven, found)
    dtype = proven.candidate.out.node.meta["val"].dtype
    sizes = [
        axes[0].size if axes else sympy.Integer(1)
        for axes in (proven.roles.head, proven.roles.value)
    ]
    head, value = (int(size) if size.is_Integer else 0 for size in sizes)
    refused = flex_supported(device.type, training, head, value, dtype)
    if program.weight is not None:
        refused = "it has no place for factors after the softmax"
    elif proven.candidate.dropout_p:
        refused = "it has no dropout"
    what = _what(proven)
    dropout = "it has no dropout" if proven.candidate.dropout_p else None
    ours = dropout or block_sparse.refusal(program, device.type, head, value, dtype)
    chosen, why = _faster(proven, device, training)
    if ours is None and (refused is not None or chosen == "block_sparse_attention"):
        why = f"flex_attention: {refused}" if refused is not None else why
        return KernelPlan(
            kernel="block_sparse_attention",
            why=f"{what}: printed into our own kernel, blocks without a kept key are skipped; {why}",
        )
    if refused is None:
        return KernelPlan(
            kernel="flex_attention",
            why=f"{what}: printed into flex_attention, blocks without a kept key are skipped",
        )
    return KernelPlan(
        kernel="program_attention",
        why=f"{what}: computed tile by tile from the formula; flex_attention: {refused}",
    )


def plan_paged(paged: Paged, device: torch.device) -> KernelPlan | Reason:
    """The kernel for a site whose keys and values are in pages, or why it cannot be used."""
    program = paged.program
    for formula in (program.score, program.keep, program.sink):
        unknown = None if formula is None or device.type == "cpu" else unprintable(formula)
        if unknown is not None:
            return Reason(code="paged-formula", message=f"the kernel has no text for {unknown}")
    parts = ["causal"] if paged.causal else []
    parts += [f"window of {paged.window}"] if paged.window else []
    parts += ["mask formula"] if program.keep is not sympy.true else []
    parts += ["score formula"] if program.score != ex.x else []
    parts += ["sink"] if program.sink is not None else []
    listed = ", ".join(parts) or "all keys of the sequence"
    return KernelPlan(
        kernel="paged_attention",
        flags={"causal": paged.causal, "window": paged.window},
        why=f"K and V are read from their pages, nothing is gathered: {listed}",
    )


def _faster(proven: Proven, device: torch.device, training: bool) -> tuple[str, str]:
    """The kernel that the table of measured cases names."""
    keys = proven.roles.sizes()[ex.s]
    return winners.kernel_for(
        winners.case_of(proven.mask.atoms, proven.program),
        device=_device_name(device),
        tokens=int(keys) if keys.is_Integer else None,
        training=training,
    )


def _device_name(device: torch.device) -> str:
    has_name = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if has_name else device.type


def _plan_fused(proven: Proven, device: torch.device) -> KernelPlan | None:
    program, roles = proven.program, proven.roles
    grouped = bool(roles.group)
    dtype = proven.v.dtype
    flags = {"enable_gqa": grouped and device.type == "cuda" and dtype in FUSED_GQA}
    bias = program.score - ex.x
    tail = ", KV heads shared by the group" if flags["enable_gqa"] else ""
    if bias == 0 and program.keep is sympy.true:
        return KernelPlan(kernel="sdpa", flags=flags, why=f"dense: no mask at all{tail}")
    if bias == 0 and program.keep == sympy.Le(ex.s, ex.t):
        flags["is_causal"] = True
        return KernelPlan(kernel="sdpa", flags=flags, why=f"proven causal: no mask tensor{tail}")
    if proven.is_dense_bias:
        flags["mask"] = "tensor"
        why = "a bias or mask that is not provable stays a tensor; fused attention takes it"
        return KernelPlan(kernel="sdpa", flags=flags, why=why)
    rows = roles.queries and bool(program.keep.has(ex.t) or bias.has(ex.t))
    if not rows:
        flags["mask"] = "row"
        why = "the mask is the same for all queries: one row per sequence"
        return KernelPlan(kernel="sdpa", flags=flags, why=why)
    return None


def _kept(proven: Proven, found: KernelPlan) -> KernelPlan:
    """Leave fused attention as it is where it would only be written anew."""
    anchor = proven.candidate.anchor
    if not proven.candidate.is_fused:
        return found
    has_mask = (len(anchor.args) > 3 and anchor.args[3] is not None) or anchor.kwargs.get(
        "attn_mask"
    )
    if has_mask and not found.flags.get("mask"):
        return found  # the mask has become a flag, or nothing at all
    if found.flags.get("enable_gqa") and not anchor.kwargs.get("enable_gqa"):
        return found
    flags = {**found.flags, "kept": True}
    return KernelPlan(kernel="sdpa", flags=flags, why=f"{found.why}; fused already, kept as it is")


def _what(proven: Proven) -> str:
    parts = []
    if proven.program.keep is not sympy.true:
        parts.append(f"proven mask {' & '.join(atom.kind for atom in proven.mask.atoms)}")
    if (proven.program.score - ex.x).has(ex.x) or (proven.program.score - ex.x).has(Load, ex.s):
        parts.append("score formula")
    if proven.program.sink is not None:
        parts.append("sink")
    if proven.program.weight is not None:
        parts.append("weight factors")
    return ", ".join(parts) or "score formula"


def plan_selected(
    *, n_queries: Size, n_keys: Size, query_heads: Size, kv_heads: Size, head_dim: Size,
    n_slots: Size, dtype: torch.dtype, device: torch.device, batch: Size = 1,
    value_dim: Size | None = None, block_size: int = 64, causal: bool = True,
    training: bool = False, overlap: Overlap | None = None, allow_dense: bool = False,
) -> KernelPlan:  # fmt: skip
    """The loop order of a selected attention, with the prediction in words.

    Args:
        n_queries: T. Sizes may be symbolic, of torch or of sympy: `loop_order` is left empty then,
            which is None for the operator; it chooses by the sizes of each call, so no guard is
            needed.
        n_keys: S.
        query_heads: Hq.
        kv_heads: Hkv.
        head_dim: D.
        n_slots: K, the KV blocks that a token selects.
        dtype: Of queries, keys and values.
        device: Where it will run. On the CPU, where every loop order runs the same code, the plan
            is that for a GPU.
        batch: B.
        value_dim: Dv; D if left out.
        block_size: Keys in a KV block.
        causal: Whether a query reads only keys up to its own position.
        training: Whether gradients are computed too.
        overlap: How much neighbouring tokens agree, as `measure_overlap` finds; if left out, no
            more than on the first KV block and the last two.
        allow_dense: Whether the caller takes dense attention where that is faster. It reads more
            keys: another function, unless the selection holds them all.
    """
    value_dim = head_dim if value_dim is None else value_dim
    sizes = [
        int(size) if isinstance(size, sympy.Integer) else size
        for size in (batch, n_queries, n_keys, query_heads, kv_heads, head_dim, value_dim, n_slots)
    ]
    hints = [_compat.size_hint(size) for size in sizes]
    if None in hints:
        why = "sizes are not known yet: chosen at each call"
        return KernelPlan(kernel="selected_attention", why=why)
    names = (
        "batch", "n_queries", "n_keys", "query_heads", "kv_heads", "head_dim", "value_dim",
        "n_slots",
    )  # fmt: skip
    problem = Problem(
        **dict(zip(names, hints, strict=True)), block_size=block_size, causal=causal,
        dtype=str(dtype).removeprefix("torch."), backward=training, overlap=overlap,
    )  # fmt: skip
    known = rates.lookup(device_name(device))
    found = costs.predict(problem, known, LOOP_ORDERS)
    if not all(type(size) is int for size in sizes):
        why = f"chosen at each call; at {problem.n_queries} tokens {found}"
        return KernelPlan(kernel="selected_attention", why=why)
    # what F.scaled_dot_product_attention can do
    aligned = not causal or problem.n_queries in (1, problem.n_keys)
    if allow_dense and aligned and found.is_dense_faster:
        return _plan_dense(problem, found, device, dtype)
    flips = costs.crossovers(problem, known, "group", loop_orders=LOOP_ORDERS)
    if allow_dense and aligned and problem.n_queries > 1:
        flips += costs.crossovers(problem, known, "tokens", loop_orders=LOOP_ORDERS, dense=True)
    why = "; ".join([str(found), *map(str, flips)])
    return KernelPlan(kernel="selected_attention", loop_order=found.fastest, why=why)


def _plan_dense(
    problem: Problem, found: costs.Prediction, device: torch.device, dtype: torch.dtype
) -> KernelPlan:
    """Dense attention in place of a selected one that is predicted to be slower."""
    grouped = problem.query_heads != problem.kv_heads
    flags = {
        "enable_gqa": grouped and device.type == "cuda" and dtype in FUSED_GQA,
        "is_causal": problem.causal and problem.n_queries > 1,
    }
    ms = costs.short_ms(found.ms[DENSE])
    why = f"dense attention is the fastest: {ms} ms predicted; {found}"
    return KernelPlan(kernel="sdpa", flags=flags, why=why)


def device_name(device: torch.device) -> str:
    """What `sparse_compile.rates.lookup` calls a device."""
    is_here = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if is_here else device.type


def measure_overlap(block_indices: Tensor, *, n_tiles: int = 64) -> Overlap:
    """How much neighbouring tokens of a selection agree, from a sample of its tiles.

    It waits for the device: for benchmarks, and for plans that are made once.

    Args:
        block_indices: [B, Hkv, T, K] int32, -1 is none.
        n_tiles: How many tiles of 64 tokens to look at, evenly spread over T.
    """
    n_tokens, n_slots = block_indices.shape[2:]
    n_all = -(-n_tokens // TILE_TOKENS)
    n_tiles = min(n_tiles, n_all)
    looked_at = torch.arange(n_tiles, device=block_indices.device) * n_all // n_tiles
    padding = (0, 0, 0, n_all * TILE_TOKENS - n_tokens)
    padded = torch.nn.functional.pad(block_indices, padding, value=-1)
    tiles = padded.unflatten(2, (n_all, TILE_TOKENS))[:, :, looked_at]
    tiles = tiles.reshape(-1, TILE_TOKENS * n_slots).long()  # a row for each tile and KV head
    n_blocks = int(tiles.max()) + 1
    counts = tiles.new_zeros(tiles.shape[0], n_blocks + 1)
    counts.scatter_add_(1, tiles.where(tiles >= 0, n_blocks), torch.ones_like(tiles))
    counts = counts[:, :n_blocks]
    crowded = counts >= TILE_SHARED
    n_seen = (n_tokens - looked_at * TILE_TOKENS).clamp(max=TILE_TOKENS).sum()  # by a KV head
    n_seen = int(n_seen) * tiles.shape[0] // n_tiles
    return Overlap(
        shared=int(crowded.sum()) / tiles.shape[0],
        left=int(counts.masked_fill(crowded, 0).sum()) / n_seen,
    )
