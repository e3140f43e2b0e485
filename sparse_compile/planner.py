"""Chooses what replaces a site, and says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from sparse_compile import expressions as ex
from sparse_compile.expressions import Load
from sparse_compile.ir import KernelPlan
from sparse_compile.passes.lower_flex import flex_supported

if TYPE_CHECKING:
    from sparse_compile.passes.programs import Proven

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
    if refused is None:
        return KernelPlan(
            kernel="flex_attention",
            why=f"{what}: printed into flex_attention, blocks without a kept key are skipped",
        )
    return KernelPlan(
        kernel="program_attention",
        why=f"{what}: computed tile by tile from the formula; flex_attention: {refused}",
    )


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
