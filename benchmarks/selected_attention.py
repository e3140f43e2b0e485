"""Selected attention in every loop order beside dense attention and published kernels.

    python -m benchmarks.selected_attention                    # on a GPU: ours and dense attention
    python -m benchmarks.selected_attention --peers DIR        # and the libraries in DIR
    python -m benchmarks.selected_attention --tiny             # on a CPU, in seconds

Forward and backward, three patterns of selections, the same inputs for all. A sample of rows is
compared with float64 before anything is timed; `benchmarks/peers.py` says what DIR holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks import common, floors, peers, row_reference, selections
from benchmarks.attention_program import (
    VERDICT_COLUMNS,
    parser,
    run,
    show_host,
    show_memory,
    show_times,
    verdicts,
)
from benchmarks.attention_runs import (
    Problem,
    Setting,
    Variant,
    dense_variants,
    measure,
    peer_variant,
    release,
    share,
)
from sparse_compile import ops
from sparse_compile.kernels.selected_attention import LOOP_ORDERS

if TYPE_CHECKING:
    from benchmarks.common import Record

NAME = "selected_attention.json"
PATTERNS = ("random", "clustered", "model")
N_ROWS = 48
DENSE = "dense"  # in place of a pattern: all keys


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: sizes, and how the KV blocks were chosen."""

    shape: floors.Shape
    pattern: str


def make_inputs(case: Case, setting: Setting) -> tuple[dict[str, Tensor], Tensor | None]:
    """q, k and v in the working dtype, and the selection; the same each time for a seed."""
    torch.manual_seed(setting.seed)
    shape, device = case.shape, setting.device
    sizes = (1, shape.query_heads, shape.kv_heads, shape.tokens, shape.head_dim, device)
    if case.pattern == "model":
        q, k = (x.to(setting.dtype) for x in selections.planted_heads(*sizes))
    else:
        q, k = (
            torch.randn(1, heads, shape.tokens, shape.head_dim, device=device, dtype=setting.dtype)
            for heads in (shape.query_heads, shape.kv_heads)
        )
    inputs = {"q": q, "k": k, "v": torch.randn_like(k)}
    if case.pattern == DENSE:
        return inputs, None
    if case.pattern == "model":
        return inputs, selections.by_model(q, k, shape.slots, shape.block_size)
    lists = selections.make(
        case.pattern, 1, shape.kv_heads, shape.tokens, shape.slots, shape.block_size, device
    )
    return inputs, lists


def pose(case: Case, setting: Setting) -> tuple[Problem, Tensor | None]:
    """The inputs of a case, with what sampled rows must give, and its selection."""
    inputs, lists = make_inputs(case, setting)
    rows = row_reference.sample(case.shape.tokens, N_ROWS, setting.device)
    grad_rows = torch.randn_like(inputs["q"][:, :, rows])
    reference = partial(row_reference.dense, rows=rows)
    if lists is not None:
        reference = partial(
            row_reference.selected, rows=rows, block_indices=lists,
            block_size=case.shape.block_size,
        )  # fmt: skip
    truth = row_reference.truth_of(reference, inputs, grad_rows)
    return Problem(inputs=inputs, rows=rows, grad_rows=grad_rows, truth=truth), lists


def our_variants(case: Case, lists: Tensor) -> list[Variant]:
    """Every loop order, and the one that is chosen if none is asked for."""

    def variant(order: str | None) -> Variant:
        return Variant(
            name=order or "chosen",
            kind="ours",
            run=lambda x: ops.selected_attention(
                x["q"], x["k"], x["v"], lists, block_size=case.shape.block_size, loop_order=order
            ),  # type: ignore[arg-type]  # LOOP_ORDERS holds what LoopOrder names
        )

    return [variant(order) for order in (*LOOP_ORDERS, None)]


def peer_variants(case: Case, lists: Tensor, found: Sequence[peers.Peer]) -> list[Variant]:
    """The libraries, each with the lists as it wants them."""

    def variant(peer: peers.Peer) -> Variant:
        theirs = peer.lists_in(lists)
        return peer_variant(
            peer, lambda x: peer.selected(x["q"], x["k"], x["v"], theirs), case.shape.group
        )

    return [variant(peer) for peer in found]


def run_case(
    case: Case, setting: Setting, found: Sequence[peers.Peer], *, ours: bool
) -> Iterator[Record]:
    """Measure our kernels on a case (or dense attention), or those of the libraries."""
    problem, lists = pose(case, setting)
    shape = case.shape
    if lists is None:
        variants = dense_variants(setting.device, shape.group)
        n_blocks = n_keys = None
        n_pairs = shape.query_heads * shape.tokens * (shape.tokens + 1) // 2
    else:
        variants = our_variants(case, lists) if ours else peer_variants(case, lists, found)
        n_blocks, n_keys = floors.count(lists, shape.block_size)
        n_pairs = n_keys * shape.group
    list_bytes = 0 if lists is None else lists.nbytes
    about: Record = {
        "pattern": case.pattern,
        **asdict(shape),
        "batch": 1,
        "kv_heads": shape.kv_heads,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "causal": True,
        "seed": setting.seed,
        "n_selected": n_blocks,
        "n_pairs": n_pairs,
    }
    for variant in variants:
        for record in measure(variant, problem, setting):
            direction = record["direction"]
            floor = floors.attention(shape, n_pairs, direction, list_bytes)
            order_ms = None
            if n_blocks is not None:
                order_ms = floors.loop_order_ms(variant.name, shape, n_blocks, direction)
            yield {
                **about,
                **record,
                **floor.fields(),
                "floor_share": share(floor.floor_ms, record.get("median_ms")),
                "loop_order_l2_ms": order_ms,
                "target_ms": floors.target_ms(shape.tokens, shape.group, case.pattern, direction),
                "at_most_mib": floors.EXTRA_MIB.get((shape.tokens, direction)),
            }


def run_all(
    shapes: Sequence[floors.Shape], patterns: Sequence[str], setting: Setting,
    found: Sequence[peers.Peer],
) -> Iterator[Record]:  # fmt: skip
    """Ours and dense attention on all cases, then the libraries, which may break the device."""
    for ours in (True, False) if found else (True,):
        for shape in shapes:
            for pattern in (*([DENSE] if ours else []), *patterns):
                yield from run_case(Case(shape=shape, pattern=pattern), setting, found, ours=ours)
                release(setting.device)


def show(records: Sequence[Record]) -> None:
    """Print times, shares of the floor, memory, and which goals are met."""
    by = ("tokens", "group")
    for direction in ("forward", "backward"):
        of_direction = [r for r in records if r["direction"] == direction]
        sparse = [r for r in of_direction if r["pattern"] != DENSE]
        # dense attention reads the same q, k and v whatever the pattern; its own floor is left out
        dense = [
            {**r, "floor_ms": None, "floor_share": None} for r in of_direction if r not in sparse
        ]
        patterns = list(dict.fromkeys(r["pattern"] for r in sparse))
        for pattern in patterns:
            chosen = [r for r in sparse if r["pattern"] == pattern]
            show_times(f"{direction}, {pattern}", chosen + dense, by)
        for pattern in patterns[:1]:
            chosen = [r for r in sparse if r["pattern"] == pattern] + dense
            show_memory(f"{direction}, {pattern}", chosen, by)
            show_host(f"{direction}, {pattern}", chosen, by)
        case = ("pattern", *by)
        rows = verdicts(sparse, case)
        common.print_table(f"{direction}: goals, ms", [*case, *VERDICT_COLUMNS], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; returns 1 if a kernel of ours was wrong or failed."""
    made = parser(__doc__.partition("\n")[0], (8192, 32768, 65536))
    made.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    chosen = made.parse_args(arguments)

    def measure_all(
        shapes: Sequence[floors.Shape], setting: Setting, found: Sequence[peers.Peer]
    ) -> Iterator[Record]:
        return run_all(shapes, chosen.patterns, setting, found)

    records, code = run(chosen, NAME, measure_all)
    if records:
        show(records)
    return code


if __name__ == "__main__":
    sys.exit(main())
