"""How often the planner picks the fastest loop order of selected attention, and what it costs.

    python -m benchmarks.planner_regret                    # on a GPU, about five minutes
    python -m benchmarks.planner_regret --from FILE --fit  # anywhere: fit efficiencies to records
    python -m benchmarks.planner_regret --tiny             # on a CPU, interpreted

Every loop order and dense attention (causal, PyTorch's fastest backend) are timed, forward and
gradients. A result is compared with a formula in a wider dtype at some tokens before it is timed. The
regret is the time of the planner's pick over that of the fastest, less 1: once as the operator
picks, which knows sizes only, and once with the overlap of the selection measured.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common, planner_fit, selections
from benchmarks.planner_truth import Inputs, Sampled
from sparse_compile import rates
from sparse_compile._support import check_gpu
from sparse_compile.cost_formulas import BACKWARD, DENSE, DENSE_BACKWARD
from sparse_compile.errors import SparseCompileError
from sparse_compile.kernels import selected_attention as operator
from sparse_compile.planner import measure_overlap

NAME = "planner_regret.json"
ERROR_RATIO = 2.0  # as in the tests: twice the natural error, and one rounding of the output
TINY_TOKENS = (1, 40)
DECODE = ((1, 32768), (16, 32768))  # batch and keys of the cases with one query


Known = dict[tuple[int, ...], dict[str, common.Record]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a kernel is compiled for."""

    query_heads: int = 32
    group: int = 4
    n_slots: int = 16
    head_dim: int = 128
    block_size: int = 64


SHAPES = (  # what matters most first: a run that is out of time leaves the last
    *(Shape(group=group) for group in (4, 16, 1, 8, 2, 32)),
    *(Shape(n_slots=slots) for slots in (4, 8, 32)),
    *(Shape(head_dim=64, group=group) for group in (4, 16)),
    *(Shape(block_size=32, n_slots=slots) for slots in (16, 32)),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem."""

    shape: Shape
    batch: int
    n_queries: int
    n_keys: int
    pattern: str

    def fields(self) -> common.Record:
        """Parameters of a record."""
        own = {"batch": self.batch, "n_queries": self.n_queries, "n_keys": self.n_keys}
        return {**asdict(self.shape), **own, "pattern": self.pattern}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a whole run has in common."""

    device: str
    dtype: torch.dtype
    n_calls: int
    seed: int
    limit_s: float  # of one timing


def cases(
    shapes: Sequence[Shape], tokens: Sequence[int], patterns: Sequence[str],
    decode: Sequence[tuple[int, int]] = DECODE,
) -> Iterator[Case]:  # fmt: skip
    """Every shape with every number of tokens; one query stands for decoding."""
    for shape in shapes:
        for n in tokens:
            if n == 1:
                for batch, n_keys in decode:
                    yield Case(
                        shape=shape, batch=batch, n_queries=1, n_keys=n_keys, pattern="random"
                    )
                continue
            for pattern in patterns:
                yield Case(shape=shape, batch=1, n_queries=n, n_keys=n, pattern=pattern)


def make(case: Case, setting: Setting) -> Inputs:
    """Random queries, keys, values and gradients, and a selection of the pattern."""
    torch.manual_seed(setting.seed)
    shape = case.shape
    kv_heads = shape.query_heads // shape.group

    def heads(n_heads: int, n_tokens: int) -> Tensor:
        size = (case.batch, n_heads, n_tokens, shape.head_dim)
        return torch.randn(size, device=setting.device, dtype=setting.dtype)

    lists = selections.make(
        case.pattern, 1, kv_heads, case.n_keys, shape.n_slots, shape.block_size, setting.device
    )
    return Inputs(
        q=heads(shape.query_heads, case.n_queries),
        k=heads(kv_heads, case.n_keys),
        v=heads(kv_heads, case.n_keys),
        grad=heads(shape.query_heads, case.n_queries),
        lists=lists[:, :, case.n_keys - case.n_queries :]
        .expand(case.batch, -1, -1, -1)
        .contiguous(),
        block_size=shape.block_size,
        scale=shape.head_dim**-0.5,
    )


def forward(inputs: Inputs, loop_order: str) -> tuple[Tensor, Tensor]:
    """The operator's output and log-sum-exp, by its kernels."""
    return operator.launch(
        inputs.q, inputs.k, inputs.v, inputs.lists, inputs.block_size, inputs.scale, True, None,
        loop_order,
    )  # fmt: skip


def backward(inputs: Inputs, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, which are the same for every loop order."""
    return operator.launch_backward(
        inputs.grad, None, inputs.q, inputs.k, inputs.v, inputs.lists, out, lse,
        inputs.block_size, inputs.scale, True, None,
    )  # fmt: skip


def measure(case: Case, setting: Setting, known: Known) -> Iterator[common.Record]:
    """Check and time every loop order, the gradients, and dense attention.

    Args:
        case: What to measure.
        setting: What the whole run has in common.
        known: Times of dense attention that do not depend on the selection; grows.
    Yields:
        A record for each; `status` is "ok", "wrong", "failed" or "out of memory", and only "ok" has
        times.
    """
    inputs = make(case, setting)
    about = {
        **case.fields(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "seed": setting.seed,
    }
    overlap = measure_overlap(inputs.lists)
    about |= {"shared": overlap.shared, "left": overlap.left}
    sampled = Sampled.of(inputs)
    for loop_order in operator.LOOP_ORDERS:
        found = _checked_and_timed(
            lambda loop_order=loop_order: forward(inputs, loop_order)[0],
            sampled.out,
            sampled,
            setting,
        )
        yield about | {"part": loop_order} | found
    if case.n_queries > 1:
        out, lse = forward(inputs, operator.LOOP_ORDERS[0])
        found = _checked_and_timed(
            lambda: backward(inputs, out, lse)[0], sampled.dq, sampled, setting
        )
        yield about | {"part": BACKWARD} | found
        del out, lse
    key = (case.batch, case.n_queries, case.n_keys, *inputs.k.shape[1::2])
    if key not in known:
        known[key] = dict(_dense(case, inputs, setting))
    for part, found in known[key].items():
        yield about | {"part": part} | found


def _dense(case: Case, inputs: Inputs, setting: Setting) -> Iterator[tuple[str, common.Record]]:
    """Causal attention to all keys by the backend that is the fastest, and its gradients."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    every = Sampled.of(inputs, dense=True)
    on_gpu = setting.device == "cuda"
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION") if on_gpu else ("MATH",)
    best: dict[str, common.Record] = {}
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    for name in names:

        def attend(backend: str = name) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(
                    *leaves, is_causal=case.n_queries > 1, enable_gqa=True
                )

        try:
            with torch.no_grad():
                found = _checked_and_timed(attend, every.out, every, setting)
            _keep_faster(best, DENSE, {**found, "backend": name})
            if case.n_queries > 1:
                out = attend()

                def gradients(out: Tensor = out) -> Tensor:
                    return torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True)[0]

                found = _checked_and_timed(gradients, every.dq, every, setting)
                _keep_faster(best, DENSE_BACKWARD, {**found, "backend": name})
        except RuntimeError as error:
            # a backend that does not take these sizes; another one does
            print(f"{name}: {_first_line(error)}", file=sys.stderr)
    yield from best.items()


def _keep_faster(best: dict[str, common.Record], part: str, found: common.Record) -> None:
    before = best.get(part)
    if before is None or found.get("median_ms", 1e9) < before.get("median_ms", 1e9):
        best[part] = found


def _checked_and_timed(
    call: Callable[[], Tensor], wanted: tuple[Tensor, float], sampled: Sampled, setting: Setting
) -> common.Record:
    truth, natural = wanted
    try:
        found: common.Record = {"error": sampled.error(call(), truth), "natural_error": natural}
        step = torch.finfo(setting.dtype).eps
        if not found["error"] <= ERROR_RATIO * natural + step / 2:
            return {"status": "wrong", **found}
        timing = common.time_calls(
            call, device=setting.device, n_calls=setting.n_calls, warm_up=0, limit_s=setting.limit_s
        )
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"status": "out of memory"}
    except Exception as error:  # a kernel that does not compile here must not end the whole run
        return {"status": "failed", "reason": _first_line(error)}
    return {"status": "ok", **found, **common.timing_fields(timing)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def warm(case: Case, setting: Setting) -> str | None:
    """Compile all that a case needs, for Triton's cache on disk; what went wrong."""
    try:
        inputs = make(case, setting)
        for loop_order in operator.LOOP_ORDERS:
            out, lse = forward(inputs, loop_order)
        if case.n_queries > 1:
            backward(inputs, out, lse)
    except Exception as error:  # it is met again, and recorded, where the case is measured
        return f"{case.fields()}: {_first_line(error)}"
    return None


def warm_all(shapes: Sequence[Shape], tokens: Sequence[int], setting: Setting, jobs: int) -> None:
    """Compile for all shapes in processes of their own, since compiling takes most of the time."""
    some = [1] * (1 in tokens) + [4096]
    todo = list(cases(shapes, some, ["random"], decode=((1, 4096),)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for trouble in pool.map(warm, todo, [setting] * len(todo)):
            if trouble is not None:
                print(trouble, file=sys.stderr)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = common.parser("The planner's picks of a loop order, beside what is the fastest.")
    parser.add_argument("--tiny", action="store_true", help="small sizes, interpreted, on a CPU")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512, 4096, 8192, 32768, 65536])
    parser.add_argument("--patterns", nargs="+", default=list(selections.PATTERNS))
    for name in ("groups", "slots", "dims", "blocks"):
        parser.add_argument(f"--{name}", nargs="+", type=int, help="only shapes with these")
    parser.add_argument("--n-calls", type=int, default=7)
    parser.add_argument("--budget-s", type=float, default=270.0, help="start no case after that")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile; 0: none")
    parser.add_argument(
        "--from", dest="source", type=Path, help="records to judge; measures nothing"
    )
    parser.add_argument(
        "--fit", action="store_true", help="write efficiencies fitted to the records"
    )
    parser.add_argument(
        "--fit-output", type=Path, help="file instead of that of the device's rates"
    )
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.patterns) - set(selections.PATTERNS)
    if unknown:
        parser.error(f"--patterns: {', '.join(sorted(unknown))} is none of {selections.PATTERNS}")
    return chosen


def chosen_shapes(chosen: argparse.Namespace) -> list[Shape]:
    """The shapes that the command line leaves."""
    limits = {
        "group": chosen.groups, "n_slots": chosen.slots, "head_dim": chosen.dims,
        "block_size": chosen.blocks,
    }  # fmt: skip
    return [
        shape
        for shape in SHAPES
        if all(
            allowed is None or getattr(shape, name) in allowed for name, allowed in limits.items()
        )
    ]


def measured(chosen: argparse.Namespace) -> list[common.Record]:
    """Measure what the command line asks for; records are written after each case."""
    setting = Setting(
        device="cuda", dtype=torch.bfloat16, n_calls=chosen.n_calls, seed=chosen.seed, limit_s=0.4
    )
    shapes, decode = chosen_shapes(chosen), DECODE
    tokens: Sequence[int] = chosen.tokens
    begin = time.perf_counter()
    if chosen.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # kernels are imported later
        setting = Setting(
            device="cpu", dtype=torch.float32, n_calls=1, seed=chosen.seed, limit_s=0.0
        )
        shapes = [Shape(query_heads=2, group=2, n_slots=3, head_dim=16, block_size=16)]
        tokens, decode = TINY_TOKENS, ((1, 40),)
    else:
        check_gpu()
        if chosen.jobs:
            warm_all(shapes, tokens, setting, chosen.jobs)
            print(f"compiled in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    where = common.environment(setting.device)
    where["rates_device"] = torch.cuda.get_device_name() if setting.device == "cuda" else "cpu"
    todo = list(cases(shapes, tokens, chosen.patterns, decode))
    records: list[common.Record] = []
    known: Known = {}
    for number, case in enumerate(todo):
        if time.perf_counter() - begin > chosen.budget_s:
            print(f"out of time: {len(todo) - number} of {len(todo)} cases left", file=sys.stderr)
            break
        records += [record | where for record in measure(case, setting, known)]
        print(f"{number + 1} of {len(todo)}: {case.fields()}", file=sys.stderr)
        common.write_json(NAME, records, chosen.output)
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, judge and print; returns 1 if a kernel failed or gave a wrong result."""
    chosen = options(arguments)
    try:
        if chosen.source is None:
            records = measured(chosen)
        else:
            records = json.loads(chosen.source.read_text(encoding="utf-8"))
        if not records:
            raise SparseCompileError(
                "nothing was measured.\n  Expected at least one case.\n"
                "  Give more time with --budget-s, or fewer limits on the shapes."
            )
        if chosen.fit:
            found = planner_fit.fit(records)
            path = chosen.fit_output or planner_fit.shipped_path(found.device)
            rates.write(found, path)
            print(f"efficiencies written to {path}", file=sys.stderr)
            show(planner_fit.held_out(records), "planner's picks, fitted on the other cases")
        else:
            show(
                planner_fit.judge(records, rates.lookup(records[0]["rates_device"])),
                "planner's picks",
            )
    except (SparseCompileError, OSError, json.JSONDecodeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    bad = [record for record in records if record["status"] in ("wrong", "failed")]
    for record in bad:
        why = record.get("reason") or f"error {record['error']:.1e}"
        print(f"{record['status']}: {record['part']}, {planner_fit.case_name(record)}: {why}")
    return 1 if bad else 0


def show(choices: Sequence[planner_fit.Choice], title: str) -> None:
    """Print how often the picks were right, and the worst of them."""
    columns = ("direction, knows", "cases", "fastest %", "within 10 %", "median", "p90", "worst")
    common.print_table(title, columns, planner_fit.summary(choices))
    worst = sorted(choices, key=lambda choice: -choice.regret)[:12]
    columns = ("case", "direction, knows", "picked", "ms", "predicted", "fastest", "ms", "regret")
    rows = [
        (
            choice.case, f"{choice.direction}, {choice.knows}", choice.picked, choice.picked_ms,
            choice.predicted_ms, choice.fastest, choice.fastest_ms, choice.regret,
        )
        for choice in worst
    ]  # fmt: skip
    common.print_table("largest regrets", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
