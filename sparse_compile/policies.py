"""What replaces a site under the policy that the user chose for it.

A site that a sparse policy cannot honour is computed exactly, and its plan says why: nothing is
approximated that could not be approximated as promised, and nothing is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import sympy
import torch

from sparse_compile import _compat
from sparse_compile import expressions as ex
from sparse_compile.ir import KernelPlan, Reason
from sparse_compile.kernels.checks import DTYPES, MAX_HEAD_DIM
from sparse_compile.kernels.top_k_selection import largest_head_dim
from sparse_compile.passes.axes import size_of
from sparse_compile.passes.lowering import compute_dtype
from sparse_compile.passes.paged_sites import Paged
from sparse_compile.planner import Size, plan, plan_paged, plan_selected

if TYPE_CHECKING:
    from sparse_compile.config import Config
    from sparse_compile.passes.programs import Proven


def plan_site(
    proven: Proven, config: Config, *, device: torch.device, training: bool
) -> KernelPlan:
    """The kernel for a site.

    Args:
        proven: The site.
        config: Of this site, see `Config.for_site`.
        device: Where it runs.
        training: Whether it needs gradients.
    """
    exact = _exact(proven, device=device, training=training)
    if config.policy == "exact":
        return exact
    if proven.paged is not None:
        found = _why_all_pages(proven, config, exact)
        if found is None:
            return _some_pages(proven, config)
    elif config.policy == "top_k":
        found = _why_not_top_k(proven, config, device)
        if found is None:
            return _top_k(proven, config, exact, device=device, training=training)
    else:
        message = "K and V are not in pages: top_p is for decoding with a PagedKVCache"
        found = Reason(code="no-pages", message=message)
    why = f"exact, not {config.policy} ({found}); {exact.why}"
    return msgspec.structs.replace(exact, why=why, not_policy=found)


def _exact(proven: Proven, *, device: torch.device, training: bool) -> KernelPlan:
    """The kernel that computes a site's own function."""
    if proven.paged is None:
        return plan(proven, device=device, training=training)
    reason = proven.paged
    if not isinstance(reason, Reason):
        found = plan_paged(proven.paged, device)
        if isinstance(found, KernelPlan):
            return found
        reason = found
    exact = plan(proven, device=device, training=training)
    why = f"K and V stay gathered from their pages ({reason}); {exact.why}"
    return msgspec.structs.replace(exact, why=why)


def _why_all_pages(proven: Proven, config: Config, exact: KernelPlan) -> Reason | None:
    """Why a site whose K and V are in pages reads all of them; None if it need not."""
    paged = proven.paged
    if exact.kernel != "paged_attention" or not isinstance(paged, Paged):
        return Reason(code="gathered", message="K and V stay gathered from their pages")
    if size_of(proven.roles.queries) != 1:
        message = "only decoding selects pages: one query a sequence, and here there may be more"
        return Reason(code="many-queries", message=message)
    if paged.sketch is None:
        message = "there is no sketch of the keys; PagedKVCache(sketch=True) keeps one"
        return Reason(code="no-sketch", message=message)
    if paged.program.sink is not None:
        return Reason(code="sink", message="progressive attention has no sink in its softmax")
    head = size_of(proven.roles.head)
    if not head.is_Integer or head % 2:
        return Reason(code="head-dim", message=f"a sketch has pairs of channels, not {head}")
    return _too_short(proven, config)


def _some_pages(proven: Proven, config: Config) -> KernelPlan:
    """Progressive attention: until a share of the mass is read, or as many pages as `k` says."""
    paged = proven.paged
    assert isinstance(paged, Paged)
    page_size = int(paged.pool.meta["val"].shape[3])
    if config.policy == "top_p":
        p, first, last, most = config.p, 1, 2, 0
        how = f"pages by falling mass, as the sketch has it, until {p} is verified"
    else:
        assert config.k is not None
        pages = -(-config.block_size // page_size)  # of a KV block
        p, most = 1.0, config.k * pages
        first, last = (n * pages for n in config.forced_blocks())
        how = f"the {most} pages of {page_size} keys that weigh most by the sketch"
    return KernelPlan(
        kernel="progressive_attention",
        flags={"p": p, "sinks": first, "local": last, "max_pages": most},
        why=f"{how}, {first} first and {last} last among them",
        policy=config.policy,
    )


def _why_not_top_k(proven: Proven, config: Config, device: torch.device) -> Reason | None:
    """Why a site's rows cannot read selected KV blocks alone; None if they can."""
    return _other_function(proven) or _other_sizes(proven, config, device)


def _other_function(proven: Proven) -> Reason | None:
    """What a site computes besides causal softmax attention."""
    program, roles = proven.program, proven.roles
    if proven.candidate.dropout_p:
        return Reason(code="dropout", message="selected attention has no dropout")
    if program.weight is not None:
        return Reason(code="weight-factors", message="weights are changed after the softmax")
    if program.sink is not None:
        return Reason(code="sink", message="selected attention has no sink in its softmax")
    if proven.is_dense_bias or proven.mask.opaque:
        message = "a bias or mask stays a tensor, which selection cannot read"
        return Reason(code="mask-tensor", message=message)
    if (program.score - ex.x) != 0:
        return Reason(code="score-formula", message="scores are changed before the softmax")
    if size_of(roles.queries) == 1:
        message = "pooling the keys for one query reads as much as attention to all of them"
        return Reason(code="one-query", message=message)
    if not _is_causal(proven):
        atoms = [str(atom) if atom.kind == "causal" else atom.kind for atom in proven.mask.atoms]
        message = f"the mask is {' & '.join(atoms)}, not causal up to the last key"
        if not atoms:
            message = "every query reads every key, as in an encoder or in decoding"
        if "key_padding" in atoms:
            message += "; leave out attention_mask where no token is padding"
        return Reason(code="mask-not-causal", message=message)
    return None


def _is_causal(proven: Proven) -> bool:
    """Whether query `t` reads all keys up to `t + S - T`, and there is always one."""
    keep, roles = proven.program.keep, proven.roles
    if not isinstance(keep, sympy.Le) or keep.lhs != ex.s:
        return False
    queries, keys = size_of(roles.queries), size_of(roles.keys)
    if sympy.expand(keep.rhs - ex.t - (keys - queries)) != 0:
        return False
    return bool(_size(proven, keys) >= _size(proven, queries))  # a guard where that is not known


def _other_sizes(proven: Proven, config: Config, device: torch.device) -> Reason | None:
    """What the kernels have no place for, and what the user wants exact."""
    roles, dtype = proven.roles, compute_dtype(proven)
    # comparing symbolic sizes adds guards
    head, value = (_size(proven, size_of(axes)) for axes in (roles.head, roles.value))
    if head > MAX_HEAD_DIM or value > MAX_HEAD_DIM:
        message = f"heads have {head} and {value} channels, and {MAX_HEAD_DIM} is the most"
        return Reason(code="head-dim", message=message)
    limit = largest_head_dim(config.scores)
    if head > limit:
        message = f"scores by {config.scores} take at most {limit} channels, not {head}"
        return Reason(code="head-dim", message=message)
    if dtype not in DTYPES and (device.type, dtype) != ("cpu", torch.float64):
        return Reason(code="dtype", message=f"selected attention has no {dtype} on {device.type}")
    return _too_short(proven, config)


def _too_short(proven: Proven, config: Config) -> Reason | None:
    if config.min_tokens and _size(proven, size_of(proven.roles.keys)) < config.min_tokens:
        message = f"fewer than {config.min_tokens} key positions"
        return Reason(code="min-tokens", message=message)
    return None


def _top_k(
    proven: Proven, config: Config, exact: KernelPlan, *, device: torch.device, training: bool
) -> KernelPlan:
    roles, k, size = proven.roles, config.k, config.block_size
    assert k is not None
    n_keys = size_of(roles.keys)
    if n_keys.is_Integer and n_keys <= k * size:
        n_blocks = -(-int(n_keys) // size)
        why = f"top_k of {k} holds all {n_blocks} KV blocks, so dense is the same; {exact.why}"
        return msgspec.structs.replace(exact, why=why, policy="top_k")
    names = ("batch", "n_queries", "n_keys", "query_heads", "kv_heads", "head_dim", "value_dim")
    axes = (
        roles.batch, roles.queries, roles.keys, roles.query_heads, roles.kv_heads, roles.head,
        roles.value,
    )  # fmt: skip
    sizes = {name: _size(proven, size_of(of)) for name, of in zip(names, axes, strict=True)}
    found = plan_selected(
        **sizes, n_slots=k, block_size=size, dtype=compute_dtype(proven), device=device,
        training=training,
    )  # fmt: skip
    sinks, local = config.forced_blocks()
    of = f"{k} of {-(-int(n_keys) // size)}" if n_keys.is_Integer else str(k)
    why = (
        f"{of} KV blocks of {size} keys, {sinks} first and {local} last among them, "
        f"the others by {config.scores}; {found.why}"
    )
    flags = {"k": k, "block_size": size, "sinks": sinks, "local": local, "scores": config.scores}
    return msgspec.structs.replace(found, flags=flags, why=why, policy="top_k")


def _size(proven: Proven, size: sympy.Expr) -> Size:
    """A size as planners take it: a number, or PyTorch's symbol for it."""
    return _compat.symbolic_size(size, proven.candidate.out.node.meta["val"])
