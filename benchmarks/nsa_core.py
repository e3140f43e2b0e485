"""The core of Native Sparse Attention, whole and part by part, beside published kernels.

    python -m benchmarks.nsa_core                    # on a GPU: ours and dense attention
    python -m benchmarks.nsa_core --peers DIR        # and the libraries in DIR
    python -m benchmarks.nsa_core --tiny             # on a CPU, in seconds

Compressed keys and values are given, means of 32 tokens every 16; fla makes its own, of 64 every
64. Queries and keys have a planted structure. A sample of rows is compared with float64 before
anything is timed, for each library with the KV blocks that it chose itself; how good that choice
is, is recorded. `benchmarks/peers.py` says what DIR holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks import common, floors, peers, row_reference, selections
from benchmarks.attention_program import VERDICT_COLUMNS, parser, run, show_times, verdicts
from benchmarks.attention_runs import (
    Named,
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

NAME = "nsa_core.json"
N_ROWS = 48
COMPRESSED = ("q", "k_cmp", "v_cmp")
ALL = ("q", "k", "v", "k_cmp", "v_cmp", "gates")
# A KV block that is chosen instead of a better one costs at most this share of the row's scores:
# bfloat16 steps by 2 ** -7, and scores that differ by less may come in any order.
CHOICE_LOSS = 2.0**-7


def make_inputs(core: floors.Core, setting: Setting) -> dict[str, Tensor]:
    """All inputs in the working dtype; the same each time for a seed."""
    torch.manual_seed(setting.seed)
    shape = core.shape
    q, k = (
        x.to(setting.dtype)
        for x in selections.planted_heads(
            1, shape.query_heads, shape.kv_heads, shape.tokens, shape.head_dim, setting.device
        )
    )
    v = torch.randn_like(k)
    k_cmp, v_cmp = (selections.pooled(x, core.block, core.stride).contiguous() for x in (k, v))
    gates = torch.rand(*q.shape[:3], 3, device=q.device, dtype=q.dtype)
    return {"q": q, "k": k, "v": v, "k_cmp": k_cmp, "v_cmp": v_cmp, "gates": gates}


def whole_rows(
    inputs: Named, rounding: torch.dtype | None, rows: Tensor, lists: Tensor, core: floors.Core,
    pools: bool,
) -> Tensor:  # fmt: skip
    """The gated sum of the branches for sampled rows, [B, Hq, R, D].

    Args:
        inputs: By name.
        rounding: The working dtype, in which branches are rounded; None for the exact sum.
        rows: Tokens.
        lists: The KV blocks of every token.
        core: Sizes.
        pools: Whether compressed keys and values are made here, and get no gradient of their own.
    """

    def rounded(x: Tensor) -> Tensor:
        return x if rounding is None else x.to(rounding).to(x.dtype)

    if pools:
        made = {
            f"{name}_cmp": rounded(selections.pooled(inputs[name], core.block, core.stride))
            for name in ("k", "v")
        }
        inputs = {**inputs, **made}
    branches = (
        row_reference.compressed(inputs, rounding, rows, core.block, core.stride),
        row_reference.selected(inputs, rounding, rows, lists, core.shape.block_size),
        row_reference.window(inputs, rounding, rows, core.window),
    )
    gates = inputs["gates"][:, :, rows].split(1, dim=-1)
    total = torch.zeros_like(branches[0])
    for gate, branch in zip(gates, branches, strict=True):
        total = total + gate * rounded(branch)
    return total


class Bench:
    """Measures the parts and the whole of one core."""

    def __init__(self, core: floors.Core, setting: Setting) -> None:
        """Make the inputs and choose the rows that are checked."""
        self.core, self.shape, self.setting = core, core.shape, setting
        self.inputs = make_inputs(core, setting)
        self.rows = row_reference.sample(core.shape.tokens, N_ROWS, setting.device)
        self.grad_rows = torch.randn_like(self.inputs["q"][:, :, self.rows])
        self.lists = self._our_choice(self._our_lse())

    def _our_lse(self) -> Tensor:
        q, k_cmp, v_cmp = (self.inputs[name] for name in COMPRESSED)
        return ops.compressed_attention(q, k_cmp, v_cmp, **self.core.sizes)[1]

    def _our_choice(self, lse: Tensor) -> Tensor:
        return ops.select_top_k(
            self.inputs["q"], self.inputs["k_cmp"], lse, k=self.shape.slots,
            block_size=self.shape.block_size, sinks=peers.SINKS, local=peers.LOCAL,
            **self.core.sizes,
        )  # fmt: skip

    def problem(self, takes: Sequence[str], reference: row_reference.Reference) -> Problem:
        """The inputs that a part takes, and what its sampled rows must be."""
        inputs = {name: self.inputs[name] for name in takes}
        truth = row_reference.truth_of(reference, inputs, self.grad_rows)
        return Problem(inputs=inputs, rows=self.rows, grad_rows=self.grad_rows, truth=truth)

    def quality(self, lists: Tensor, core: floors.Core) -> float:
        """How near a choice comes to the best, for compressed keys of a core's sizes."""
        inputs = dict(self.inputs)
        if core.sizes != self.core.sizes:
            inputs["k_cmp"] = selections.pooled(inputs["k"], core.block, core.stride)
        scores = row_reference.block_scores(
            inputs, self.rows, block_size=self.shape.block_size, sinks=peers.SINKS,
            local=peers.LOCAL, **core.sizes,
        )  # fmt: skip
        return row_reference.choice_quality(scores, lists[:, :, self.rows])

    def ours(self) -> Iterator[Record]:
        """Our parts, our whole in every loop order, and dense attention."""
        yield from self._our_compressed()
        yield self._our_choosing()
        yield from self._selected([])
        yield from self._window()
        reference = partial(
            whole_rows, rows=self.rows, lists=self.lists, core=self.core, pools=False
        )
        problem = self.problem(ALL, reference)
        for order in (*LOOP_ORDERS, None):
            variant = Variant(
                name=order or "chosen", kind="ours", takes=ALL, run=self._our_whole(order),
                directions=("forward", "backward", "step"),
            )  # fmt: skip
            yield from self._report("whole", self.core, variant, problem)
        problem = self.problem(("q", "k", "v"), partial(row_reference.dense, rows=self.rows))
        for variant in dense_variants(self.setting.device, self.shape.group):
            yield from self._report("dense", self.core, variant, problem)

    def theirs(self, found: Sequence[peers.Peer]) -> Iterator[Record]:
        """The libraries: compressing and choosing, selected attention, and the whole."""
        yield from self._selected(found)
        for peer in found:
            yield from self._their_whole(peer)

    def _our_compressed(self) -> Iterator[Record]:
        def alone(x: Named) -> Tensor:
            return ops.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **self.core.sizes)[0]

        def and_choice(x: Named) -> Tensor:
            out, lse = ops.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **self.core.sizes)
            self._our_choice(lse)
            return out

        reference = partial(row_reference.compressed, rows=self.rows, **self.core.sizes)
        problem = self.problem(COMPRESSED, reference)
        for part, call in (("compressed", alone), ("compressed and choice", and_choice)):
            variant = Variant(name="chosen", kind="ours", takes=COMPRESSED, run=call)
            yield from self._report(part, self.core, variant, problem)

    def _our_choosing(self) -> Record:
        lse = self._our_lse()
        found: Record = {
            "variant": "chosen", "kind": "ours", "direction": "forward", "status": "ok",
            "choice_quality": self.quality(self.lists, self.core),
        }  # fmt: skip
        if found["choice_quality"] < 1 - CHOICE_LOSS:
            found["status"] = "wrong"
        else:
            timing = common.time_calls(
                lambda: self._our_choice(lse), device=self.setting.device,
                n_calls=self.setting.n_calls, limit_s=self.setting.limit_s,
            )  # fmt: skip
            found |= common.timing_fields(timing)
        return self._described("choice", self.core, found)

    def _selected(self, found: Sequence[peers.Peer]) -> Iterator[Record]:
        """Selected attention on our lists, by ours if no library is given."""
        reference = partial(
            row_reference.selected, rows=self.rows, block_indices=self.lists,
            block_size=self.shape.block_size,
        )  # fmt: skip
        problem = self.problem(("q", "k", "v"), reference)
        ours = Variant(
            name="chosen",
            kind="ours",
            run=lambda x: ops.selected_attention(
                x["q"], x["k"], x["v"], self.lists, block_size=self.shape.block_size
            ),
        )
        for variant in [self._their_selected(peer) for peer in found] or [ours]:
            yield from self._report("selected", self.core, variant, problem)

    def _their_selected(self, peer: peers.Peer) -> Variant:
        lists = peer.lists_in(self.lists)
        return peer_variant(
            peer, lambda x: peer.selected(x["q"], x["k"], x["v"], lists), self.shape.group
        )

    def _window(self) -> Iterator[Record]:
        reference = partial(row_reference.window, rows=self.rows, width=self.core.window)
        problem = self.problem(("q", "k", "v"), reference)
        width = self.core.window
        variants = [
            Variant(
                name="chosen", kind="ours",
                run=lambda x: ops.window_attention(x["q"], x["k"], x["v"], window=width)[0],
            )
        ]  # fmt: skip
        if self.setting.device == "cuda":
            variants.append(
                Variant(
                    name="dense_flash2", kind="dense",
                    run=lambda x: peers.flash_window(x["q"], x["k"], x["v"], width),
                    heads_in=lambda x: x.transpose(1, 2).contiguous(),
                    heads_out=lambda x: x.transpose(1, 2),
                )
            )  # fmt: skip
        for variant in variants:
            yield from self._report("window", self.core, variant, problem)

    def _our_whole(self, order: str | None) -> Callable[[Named], Tensor]:
        core, shape = self.core, self.shape
        return lambda x: ops.native_sparse_attention(
            *(x[name] for name in ALL), n_selected=shape.slots, window=core.window,
            block_size=shape.block_size, sinks=peers.SINKS, local=peers.LOCAL, loop_order=order,
            **core.sizes,
        )  # fmt: skip

    def _their_whole(self, peer: peers.Peer) -> Iterator[Record]:
        block, stride = peer.compression
        core = floors.Core(shape=self.shape, window=self.core.window, block=block, stride=stride)
        takes = tuple(name for name in ALL if not (peer.pools_itself and name.endswith("_cmp")))
        slots, width = self.shape.slots, core.window
        whole = Variant(
            name=peer.name, kind="peer", takes=takes, heads_in=peer.heads_in,
            heads_out=peer.heads_out, directions=("forward", "backward", "step"),
            run=lambda x: peer.core(dict(x), slots, width), refused=peer.refuses(self.shape.group),
        )  # fmt: skip
        choosing = Variant(
            name=peer.name, kind="peer", takes=COMPRESSED, heads_in=peer.heads_in,
            heads_out=peer.heads_out, refused=whole.refused,
            run=lambda x: peer.compress_and_choose(x["q"], x["k_cmp"], x["v_cmp"], slots)[0],
        )  # fmt: skip
        given = dict(self.inputs)
        if peer.pools_itself:
            given |= {
                f"{name}_cmp": selections.pooled(given[name], block, stride).contiguous()
                for name in ("k", "v")
            }
        inputs = {name: given[name] for name in COMPRESSED}
        reference = partial(row_reference.compressed, rows=self.rows, **core.sizes)
        truth = row_reference.truth_of(reference, inputs, self.grad_rows)
        problem = Problem(inputs=inputs, rows=self.rows, grad_rows=self.grad_rows, truth=truth)
        works = False
        for record in self._report("compressed and choice", core, choosing, problem):
            yield record
            works |= (record["direction"], record["status"]) == ("forward", "ok")
        if not works and not whole.refused:
            whole = replace(whole, refused="its choice of KV blocks, by which to check it, fails")
        if whole.refused:
            yield from self._report("whole", core, whole, problem)
            return
        with torch.no_grad():
            chosen = peer.compress_and_choose(*map(peer.heads_in, inputs.values()), slots)[1]
        lists = peer.lists_out(chosen)
        reference = partial(
            whole_rows, rows=self.rows, lists=lists, core=core, pools=peer.pools_itself
        )
        quality = {"choice_quality": self.quality(lists, core)}
        for record in self._report("whole", core, whole, self.problem(takes, reference)):
            yield record | quality

    def _report(
        self, part: str, core: floors.Core, variant: Variant, problem: Problem
    ) -> Iterator[Record]:
        for record in measure(variant, problem, self.setting):
            yield self._described(part, core, record)
        release(self.setting.device)

    def _described(self, part: str, core: floors.Core, record: Record) -> Record:
        shape, direction = self.shape, record["direction"]
        floor = floors.of_core(part, core, self.lists, direction)
        target = None
        if part == "whole":
            target = floors.core_target_ms(shape.tokens, shape.group, direction)
        return {
            "part": part,
            **asdict(shape),
            "batch": 1,
            "kv_heads": shape.kv_heads,
            "window": core.window,
            **core.sizes,
            "sinks": peers.SINKS,
            "local": peers.LOCAL,
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "seed": self.setting.seed,
            **record,
            **floor.fields(),
            "floor_share": share(floor.floor_ms, record.get("median_ms")),
            "target_ms": target,
        }


def run_all(
    shapes: Sequence[floors.Shape], setting: Setting, found: Sequence[peers.Peer]
) -> Iterator[Record]:
    """Ours and dense attention on all cases, then the libraries, which may break the device."""
    for ours in (True, False) if found else (True,):
        for shape in shapes:
            bench = Bench(floors.Core(shape=shape), setting)
            yield from bench.ours() if ours else bench.theirs(found)
            del bench
            release(setting.device)


def show(records: Sequence[Record]) -> None:
    """Print times, shares of the floor, and which goals are met."""
    by = ("part", "tokens", "group")
    for direction in ("forward", "backward", "step"):
        chosen = [r for r in records if r["direction"] == direction]
        if chosen:
            show_times(direction, chosen, by)
            whole = [r for r in chosen if r["part"] == "whole"]
            rows = verdicts(whole, by)
            common.print_table(f"{direction}: goals, ms", [*by, *VERDICT_COLUMNS], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; returns 1 if a kernel of ours was wrong or failed."""
    chosen = parser(__doc__.partition("\n")[0], (32768,)).parse_args(arguments)
    records, code = run(chosen, NAME, run_all)
    if records:
        show(records)
    return code


if __name__ == "__main__":
    sys.exit(main())
