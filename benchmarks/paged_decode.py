"""Decoding from pages, dense and progressive, beside fused attention to contiguous keys and values.

    python -m benchmarks.paged_decode                          # on a GPU
    python -m benchmarks.paged_decode --tokens 32768 --p 0.9 0.95
    python -m benchmarks.paged_decode --tiny                   # on a CPU, in seconds

Results of some sequences are compared with float64 before anything is timed; for progressive
attention also the true mass of what it read. The floor is the bytes that must be read, at the rate
of copies in memory.

Patterns: `planted` keys come in passages of 64 tokens, each with one of 64 topics and a direction for
it; each query head asks for one of four topics that its group shares, 11 nats above the rest on
average, beside noise of 1.5. `random` keys and queries are normal and nothing else, the worst case:
no page can be left out but for the share that `p` grants.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common, floors
from sparse_compile import ops
from sparse_compile._support import check_gpu
from sparse_compile.errors import SparseCompileError
from sparse_compile.ir import ScoreProgram
from sparse_compile.kernels.progressive_attention import progressive_attention_ref

if TYPE_CHECKING:
    from benchmarks.common import Record

NAME = "paged_decode.json"
PATTERNS = ("planted", "random")
FUSED, DENSE, PROGRESSIVE = "sdpa", "paged_attention", "progressive_attention"
ERROR_RATIO = 2.0  # as in the tests: twice the natural error, and one rounding of the output
CHECKED = 2  # sequences that are compared
TOPICS, PASSAGE, ASKED = 64, 64, 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one step, and how its keys lie."""

    batch: int
    tokens: int
    pattern: str
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def group(self) -> int:
        """G."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a whole run has in common."""

    device: str
    dtype: torch.dtype
    shares: tuple[float, ...]
    n_calls: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One step's, once in pages and once contiguous."""

    q: Tensor  # [B, Hq, 1, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor
    pool: Tensor
    table: Tensor
    lengths: Tensor
    sketch: ops.Sketch


def make_heads(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Queries [Hq, 1, D] and keys [Hkv, S, D] of one sequence, float32."""
    q = torch.randn(case.query_heads, 1, case.head_dim, device=device)
    k = torch.randn(case.kv_heads, case.tokens, case.head_dim, device=device)
    if case.pattern == "planted":
        direction = torch.randn(case.kv_heads, TOPICS, case.head_dim, device=device)
        topic = torch.randint(TOPICS, (-(-case.tokens // PASSAGE),), device=device)
        k += 0.8 * direction[:, topic.repeat_interleave(PASSAGE)[: case.tokens]]
        wanted = torch.randint(ASKED, (case.kv_heads, case.group), device=device)
        asked = direction.gather(1, wanted[..., None].expand(-1, -1, case.head_dim))
        q = 0.5 * q + 1.2 * asked.flatten(0, 1)[:, None]
    return q, k


def make_inputs(case: Case, setting: Setting) -> Inputs:
    """A step's inputs; the same each time for a seed."""
    torch.manual_seed(setting.seed)
    device, dtype = setting.device, setting.dtype
    shape = (case.batch, case.kv_heads, case.tokens, case.head_dim)
    k, v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
    q = torch.empty(case.batch, case.query_heads, 1, case.head_dim, device=device, dtype=dtype)
    n_entries = -(-case.tokens // case.page_size)
    table = torch.randperm(case.batch * n_entries, device=device).int().view(case.batch, -1)
    sizes = (table.numel(), case.kv_heads, 2, case.page_size, case.head_dim)
    pool = torch.zeros(sizes, device=device, dtype=dtype)
    sketch = ops.Sketch.empty(pool)
    lengths = torch.full((case.batch,), case.tokens, dtype=torch.int32, device=device)
    for row in range(case.batch):
        q[row], k[row] = make_heads(case, device)
        v[row].normal_()
        some = slice(row, row + 1)
        ops.paged_append(k[some], v[some], pool, table[some], lengths[some], sketch=sketch)
    return Inputs(q=q, k=k, v=v, pool=pool, table=table, lengths=lengths, sketch=sketch)


def dense_ref(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention of one sequence in a dtype, and the weights [1, Hkv, G, S]."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    weights = q.view(1, k.shape[1], -1, q.shape[3]) @ k.mT * q.shape[3] ** -0.5
    weights = weights.softmax(-1)
    return (weights @ v).view(q.shape), weights


def check_dense(out: Tensor, x: Inputs, setting: Setting) -> Record:
    """Errors of an output against float64, for some sequences."""
    error = natural = 0.0
    for row in range(min(CHECKED, len(out))):
        some = slice(row, row + 1)
        exact, _ = dense_ref(x.q[some], x.k[some], x.v[some], torch.float64)
        rough, _ = dense_ref(x.q[some], x.k[some], x.v[some], setting.dtype)
        error = max(error, float((out[some] - exact).abs().max()))
        natural = max(natural, float((rough - exact).abs().max()))
    return verdict(error, natural, x.v, setting)


def check_progressive(told: ops.Progress, p: float, x: Inputs, setting: Setting) -> Record:
    """Errors against float64 for the pages that were read, and the true mass of these."""
    program, page_size = ScoreProgram(scale=x.q.shape[3] ** -0.5), x.pool.shape[3]
    error = natural = 0.0
    masses = []
    for row in range(min(CHECKED, len(told.out))):
        some = slice(row, row + 1)
        exact, rough = (
            progressive_attention_ref(
                x.q[some].to(dtype), x.pool[x.table[row].long()].to(dtype),
                torch.arange(x.table.shape[1], device=x.table.device, dtype=torch.int32)[None],
                x.lengths[some], [], program, 0, told.pages[some], told.n_pages[some],
            )[0]
            for dtype in (torch.float64, setting.dtype)
        )  # fmt: skip
        error = max(error, float((told.out[some] - exact).abs().max()))
        natural = max(natural, float((rough - exact).abs().max()))
        _, weights = dense_ref(x.q[some], x.k[some], x.v[some], torch.float64)
        behind = x.table.shape[1] * page_size - weights.shape[-1]
        in_pages = F.pad(weights, (0, behind)).unflatten(-1, (-1, page_size)).sum(-1)
        in_pages = F.pad(in_pages, (0, 1))  # no page, for -1
        listed = told.pages[some].long()
        listed = listed.where(listed >= 0, in_pages.shape[-1] - 1)[:, :, None]
        masses.append(in_pages.gather(-1, listed.expand_as(in_pages[..., :-1])).sum(-1))
    mass = torch.cat(masses)
    return verdict(error, natural, x.v, setting) | {
        "mass_mean": float(mass.mean()),
        "mass_least": float(mass.min()),
        "rows_short": float((mass < p - 0.01).double().mean()),
        "read_share": float(told.n_pages.double().mean() / x.table.shape[1]),
        "read_share_most": float(told.n_pages.double().max() / x.table.shape[1]),
    }


def verdict(error: float, natural: float, v: Tensor, setting: Setting) -> Record:
    """Whether an error is what rounding explains: of the weights, and of the output."""
    rounding = float(v.abs().max()) * torch.finfo(setting.dtype).eps / 2
    right = error <= ERROR_RATIO * (natural + rounding)  # also false for NaN
    return {"status": "ok" if right else "wrong", "error": error, "natural_error": natural}


def floor_of(case: Case, itemsize: int, read: float | None) -> Record:
    """Bytes that a step must read: all keys and values, or the sketch and a share of these."""
    tokens = case.batch * case.kv_heads * case.tokens
    pair = 2 * case.head_dim * itemsize
    n_bytes = tokens * pair if read is None else tokens * (case.head_dim / 2 + 4 + read * pair)
    n_bytes += 2 * case.batch * case.query_heads * case.head_dim * itemsize
    return {"floor_bytes": round(n_bytes), "floor_ms": n_bytes / floors.MEMORY_BYTES_PER_S * 1e3}


def run_case(case: Case, setting: Setting) -> Iterator[Record]:
    """Measure every kernel on a case."""
    x = make_inputs(case, setting)
    itemsize = x.pool.element_size()

    def progressive(p: float) -> Callable[[], ops.Progress]:
        return lambda: ops.progressive_attention(
            x.q, x.pool, x.table, x.lengths, x.sketch, p=p, telemetry=True
        )

    def fused() -> Tensor:
        return F.scaled_dot_product_attention(x.q, x.k, x.v, enable_gqa=case.group > 1)

    def dense() -> Tensor:
        return ops.paged_attention(x.q, x.pool, x.table, x.lengths)

    found: list[tuple[str, float | None, Callable[[], object], Record]] = []
    for name, run in ((FUSED, fused), (DENSE, dense)):
        found.append((name, None, run, check_dense(run(), x, setting)))
    for p in setting.shares:
        run = progressive(p)
        found.append((PROGRESSIVE, p, run, check_progressive(run(), p, x, setting)))
    for name, p, run, checked in found:
        record = {
            **asdict(case), "dtype": str(setting.dtype).removeprefix("torch."),
            "seed": setting.seed, "variant": name, "kind": "dense" if name == FUSED else "ours",
            "p": p, **floor_of(case, itemsize, checked.get("read_share")), **checked,
        }  # fmt: skip
        if record["status"] == "ok":
            timing = common.time_calls(run, device=setting.device, n_calls=setting.n_calls)
            record |= common.timing_fields(timing)
            record["floor_share"] = record["floor_ms"] / timing.median_ms
        yield record


def run_all(cases: Sequence[Case], setting: Setting) -> Iterator[Record]:
    """Measure all cases."""
    for case in cases:
        yield from run_case(case, setting)
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def show(records: Sequence[Record]) -> None:
    """Print times, shares of the floor, and what was read."""
    rows = []
    times: dict[tuple[object, ...], float] = {}
    for record in records:
        case = (record["pattern"], record["batch"], record["tokens"])
        median = record.get("median_ms")
        if median and record["variant"] in (FUSED, DENSE):
            times[(*case, record["variant"])] = median
        faster = [
            times[(*case, name)] / median if median and (*case, name) in times else None
            for name in (FUSED, DENSE)
        ]
        rows.append((
            record["pattern"], record["batch"], record["tokens"], record["variant"], record["p"],
            record["status"], median, record["floor_ms"], record.get("floor_share"), *faster,
            record.get("read_share"), record.get("mass_mean"), record.get("rows_short"),
            record.get("host_ms"),
        ))  # fmt: skip
    columns = ("pattern", "batch", "tokens", "kernel", "p", "status", "ms", "floor, ms", "share",
               "x sdpa", "x dense", "read", "mass", "rows short", "host, ms")  # fmt: skip
    common.print_table("A step of decoding", columns, rows)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = common.parser(__doc__.partition("\n")[0])
    made.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    made.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16])
    made.add_argument("--tokens", nargs="+", type=int, default=[4096, 32768, 131072])
    made.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    made.add_argument("--p", nargs="+", type=float, default=[0.95], dest="shares")
    made.add_argument("--page-size", type=int, choices=(16, 32, 64), default=16)
    made.add_argument("--calls", type=int, default=20, help="timed calls of each measurement")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; returns 1 if a kernel gave a wrong result."""
    chosen = options(arguments)
    shares = tuple(chosen.shares)
    if chosen.tiny:
        # float32: a CPU rounds bfloat16 elsewhere than the kernels do
        setting = Setting(
            device="cpu", dtype=torch.float32, shares=shares, n_calls=3, seed=chosen.seed
        )
        sizes = {"query_heads": 4, "kv_heads": 2, "head_dim": 32}
        cases = [Case(batch=2, tokens=700, pattern=name, **sizes) for name in chosen.patterns]
    else:
        try:
            check_gpu()
        except SparseCompileError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        setting = Setting(
            device="cuda", dtype=torch.bfloat16, shares=shares, n_calls=chosen.calls,
            seed=chosen.seed,
        )  # fmt: skip
        cases = [
            Case(batch=batch, tokens=tokens, pattern=pattern, page_size=chosen.page_size)
            for pattern in chosen.patterns
            for tokens in chosen.tokens
            for batch in chosen.batches
        ]
    records = common.record_all(
        NAME, run_all(cases, setting), common.environment(setting.device), chosen.output,
        lambda record: f"{record['pattern']} B{record['batch']} S{record['tokens']} "
        f"{record['variant']}: {record['status']} {record.get('median_ms')} ms, floor "
        f"{record['floor_ms']:.3f} ms, {record['floor_bytes']} bytes",
    )  # fmt: skip
    show(records)
    return common.exit_code(records)


if __name__ == "__main__":
    sys.exit(main())
