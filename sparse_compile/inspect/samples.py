"""A made-up report with every kind of site, for tests and for work on its looks."""

from __future__ import annotations

from typing import Any

import sympy

from sparse_compile import ir
from sparse_compile.expressions import Load, b, h, s, t
from sparse_compile.inspect.report import (
    GraphBreak,
    GraphReport,
    GraphSlice,
    PassTiming,
    Report,
    SiteReport,
    SliceNode,
)

CAUSAL = ir.MaskAtom(kind="causal", predicate=s <= t, text="causal")
WINDOW = ir.MaskAtom(kind="window", predicate=t - s < 512, text="window(left=512)")
CHUNK = ir.MaskAtom(
    kind="chunk", predicate=sympy.Eq(sympy.floor(t / 96), sympy.floor(s / 96)), text="chunk(96)"
)
PREFIX = ir.MaskAtom(kind="prefix", predicate=sympy.Or(s <= t, s < 16), text="prefix(16)")
PADDING = ir.MaskAtom(
    kind="key_padding",
    predicate=sympy.Ne(Load(0, b, s), 0),
    text="key_padding(attention_mask)",
)
DOCUMENT = ir.MaskAtom(
    kind="document", predicate=sympy.Eq(Load(0, b, t), Load(0, b, s)), text="document(doc_ids)"
)
KV_LENGTH = ir.MaskAtom(kind="kv_length", predicate=s <= Load(0), text="kv_length(cache_position)")

SDPA = ir.KernelPlan(
    kernel="sdpa",
    flags={"is_causal": True, "enable_gqa": True},
    why="causal and nothing else: PyTorch's SDPA with is_causal, no mask is materialised",
)
FLEX = ir.KernelPlan(
    kernel="flex_attention",
    why="the window leaves 2 % of the scores: block-sparse flex_attention from the predicate",
)
PROGRAM = ir.KernelPlan(
    kernel="program_attention",
    loop_order="query_major",
    why="SDPA has no soft cap: the score program is inlined",
)


def sample_site(name: str, *atoms: ir.MaskAtom, **changes: Any) -> ir.AttentionSite:
    """A site with grouped heads; `changes` replace its fields, whole numbers become sympy's."""
    fields: dict[str, Any] = {
        "anchor": "aten.softmax.int",
        "source": f"{__file__}:1",
        "batch": 2,
        "query_heads": 32,
        "kv_heads": 8,
        "query_tokens": 1024,
        "key_tokens": 1024,
        "head_dim": 128,
        "value_dim": 128,
        "dtype": "float32",
        "softmax_dtype": "float32",
        "scale": 128**-0.5,
        "mask": ir.MaskProof(atoms=atoms),
        "q_map": "q_proj[b, t, 128*h + d]",
        "k_map": "k_proj[b, s, 128*floor(h/4) + d]",
        "v_map": "v_proj[b, s, 128*floor(h/4) + d]",
    } | changes
    sizes = ("batch", "query_heads", "kv_heads", "query_tokens", "key_tokens", "head_dim")
    for size in (*sizes, "value_dim"):
        fields[size] = sympy.sympify(fields[size])
    return ir.AttentionSite(name=name, **fields)


def unread_site(name: str, code: str) -> ir.UnreadSite:
    """A site that was declined before anything was proven about it."""
    reason = ir.Reason(code=code, message="the attention weights are returned from the graph")
    return ir.UnreadSite(
        name=name, anchor="aten.softmax.int", source=f"{__file__}:1", reason=reason
    )


def operand(name: str, *shape: str, dtype: str = "int64") -> ir.Operand:
    """A tensor that a formula loads from."""
    return ir.Operand(name=name, shape=shape, dtype=dtype)


def _slice(*lines: str) -> GraphSlice:
    """Nodes from lines of `role name op input input`; `-` for no role."""
    nodes = []
    for line in lines:
        role, name, op, *inputs = line.split()
        role = "" if role == "-" else role
        nodes.append(SliceNode(name=name, op=op, inputs=tuple(inputs), role=role))  # type: ignore
    return GraphSlice(nodes=tuple(nodes))


BEFORE = _slice(
    "q query_states apply_rotary",
    "k key_states apply_rotary",
    "v value_states transpose",
    "k unsqueeze unsqueeze key_states",
    "k expand expand unsqueeze",
    "k keys reshape expand",
    "v unsqueeze_1 unsqueeze value_states",
    "v expand_1 expand unsqueeze_1",
    "v values reshape expand_1",
    "k transpose_3 transpose keys",
    "score matmul matmul query_states transpose_3",
    "score attn_weights mul matmul",
    "mask position arange",
    "mask causal le position",
    "mask fill where causal",
    "score attn_weights_1 add attn_weights fill",
    "softmax softmax softmax attn_weights_1",
    "weights to_9 to softmax",
    "weights dropout dropout to_9",
    "out attn_output matmul dropout values",
    "- transpose_4 transpose attn_output",
)
AFTER = _slice(
    "q query_states apply_rotary",
    "k key_states apply_rotary",
    "v value_states transpose",
    "new attention scaled_dot_product_attention query_states key_states value_states",
    "- transpose_4 transpose attention",
)


def sample_report() -> Report:
    """Two graphs: many layers alike, every kind of mask, declines, a failed check and pass."""
    timings = tuple(
        PassTiming(name=name, ms=ms)
        for name, ms in {"normalise": 812.5, "detect": 12.1, "prove": 133.0, "plan": 0.9}.items()
    )
    return Report(
        graphs=(
            GraphReport(sites=_layers(), n_nodes=1843, timings=timings),
            GraphReport(
                sites=_others(),
                n_nodes=191,
                timings=timings,
                error="Traceback (most recent call last):\n  ...\nKeyError: '<unknown>'",
            ),
        ),
        graph_breaks=(GraphBreak(reason="call to print()", source="model.py:44"),),
    )


def _layers() -> tuple[SiteReport, ...]:
    masked = ir.Masked(keep=s <= t, fill=float("-inf"))
    alibi = ir.Bias(value=-(sympy.Rational(1, 2) ** (h / 4)) * (t - s), text="alibi")
    plain = [
        SiteReport.from_site(
            sample_site(f"model.layers.{layer}.self_attn", CAUSAL, transforms=(masked,)),
            SDPA,
            before=BEFORE,
            after=AFTER,
            validation=f"passed: max error {layer + 1}e-13",
        )
        for layer in range(30)
    ]
    alternating = []
    for layer in range(12):
        atoms, plan = ((CAUSAL, WINDOW), FLEX) if layer % 2 == 0 else ((CAUSAL,), PROGRAM)
        site = sample_site(
            f"decoder.blocks.{layer}.attn",
            *atoms,
            query_heads=16,
            kv_heads=16,
            query_tokens=32768,
            key_tokens=32768,
            transforms=(ir.SoftCap(cap=sympy.Float(50)), alibi, masked, ir.Dropout(p=0.1)),
        )
        alternating.append(SiteReport.from_site(site, plan, before=BEFORE, after=AFTER))
    return (*plain, *alternating)


def _others() -> tuple[SiteReport, ...]:
    tokens = sympy.Symbol("s0", integer=True, positive=True)
    sites = (
        sample_site(
            "vlm.attn", CAUSAL, PADDING, operands=(operand("attention_mask", "2", "1024"),)
        ),
        sample_site(
            "packed.attn",
            DOCUMENT,
            query_tokens=tokens,
            key_tokens=tokens,
            operands=(operand("doc_ids", "2", "s0"),),
        ),
        sample_site(
            "decode.layers.0.attn",
            KV_LENGTH,
            query_tokens=1,
            key_tokens=4096,
            operands=(operand("cache_position"),),
            kv_source="static_cache",
        ),
        sample_site("chunked.attn", CAUSAL, CHUNK),
        sample_site("prefix.attn", PREFIX, query_tokens=40, key_tokens=40),
    )
    declined = (
        sample_site(
            f"t5.block.{layer}.layer.0.SelfAttention",
            mask=ir.MaskProof(opaque=True),
            transforms=(ir.Bias(value=Load(0, 0, h, t, s)),),
            operands=(operand("position_bias", "1", "32", "1024", "1024", dtype="float32"),),
            reason=ir.Reason(
                code="weights-escape",
                message=f"the attention weights softmax_{layer} are returned from the graph",
            ),
        )
        for layer in range(2)
    )
    wrong = sample_site("vit.blocks.0.attn", query_heads=12, kv_heads=12, query_tokens=197)
    return (
        *(SiteReport.from_site(site, SDPA, before=BEFORE, after=AFTER) for site in sites),
        SiteReport.from_site(wrong, SDPA, validation="failed: max error 3e-2 at [0, 1, 5, 7]"),
        *(SiteReport.from_site(site, None, before=BEFORE) for site in declined),
        SiteReport.from_site(unread_site("router.gate", "weights-escape"), None),
    )
