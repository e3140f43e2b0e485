"""Block-sparse attention beside flex_attention and fused attention, by mask and score.

    python -m benchmarks.block_sparse                 # on a GPU, all cases at both lengths
    python -m benchmarks.block_sparse --write-table   # and let the planner know the winners
    python -m benchmarks.block_sparse --tiny          # on a CPU, in seconds

Every kernel computes the same function. Its output and gradients are compared with float64 on some
rows before it is timed: the gradient of the output is zero on all other rows, so that those of keys
and values need no more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sympy
import torch
from sympy import And, Eq, Or, floor
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from benchmarks import common
from sparse_compile import winners
from sparse_compile._support import check_gpu
from sparse_compile.errors import SparseCompileError
from sparse_compile.evaluation import evaluate
from sparse_compile.expressions import INDICES, Load, b, h, s, t, x
from sparse_compile.ir import ScoreProgram
from sparse_compile.ops import block_sparse_attention, list_blocks
from sparse_compile.passes.mask_atoms import classify

NAME = "block_sparse.json"
OURS, FLEX, FUSED = "block_sparse_attention", "flex_attention", "sdpa"
ERROR_RATIO = 2.0  # as in the tests: twice the natural error, and one rounding of the output
SAMPLED = 64  # rows that are compared
ROWS_AT_A_TIME = 512  # whose kept keys are counted
CAUSAL = s <= t
Mod = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one attention, and of its masks."""

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int = 1024
    chunk: int = 2048
    document: int = 3000
    prefix: int = 1024
    cap: float = 50.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A function, once as formulas and once as flex_attention takes it."""

    mask: sympy.Basic
    mask_mod: Mod
    score: sympy.Expr | None = None
    score_mod: Mod | None = None
    sink: sympy.Expr | None = None
    operand: Callable[[int, Sizes, str], Tensor] | None = None
    fused: bool = False  # F.scaled_dot_product_attention has a flag for it


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a whole run has in common."""

    device: str
    dtype: torch.dtype
    tile: int
    block_size: int
    n_calls: int
    seed: int


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def documents(tokens: int, sizes: Sizes, device: str) -> Tensor:
    """The document of each token, [1, T]."""
    return (torch.arange(tokens, device=device) // sizes.document)[None]


def per_head(tokens: int, sizes: Sizes, device: str) -> Tensor:
    """A number for each query head: slopes as ALiBi has them, [Hq]."""
    powers = torch.arange(1, sizes.query_heads + 1, device=device) * (8 / sizes.query_heads)
    return torch.exp2(-powers)


def cases(sizes: Sizes, operand: Tensor | None) -> dict[str, Case]:
    """All cases; `operand` is what the functions of one of them read."""
    own: Any = operand
    cap = sizes.cap
    return {
        "causal": Case(mask=CAUSAL, mask_mod=_causal, fused=True),
        "window": Case(
            mask=And(CAUSAL, t - s < sizes.window),
            mask_mod=lambda b, h, q, k: (k <= q) & (q - k < sizes.window),
        ),
        "chunk": Case(
            mask=And(CAUSAL, Eq(floor(t / sizes.chunk), floor(s / sizes.chunk))),
            mask_mod=lambda b, h, q, k: (k <= q) & (q // sizes.chunk == k // sizes.chunk),
        ),
        "document": Case(
            mask=And(CAUSAL, Eq(Load(0, b, t), Load(0, b, s))),
            mask_mod=lambda b, h, q, k: (k <= q) & (own[b, q] == own[b, k]),
            operand=documents,
        ),
        "prefix": Case(
            mask=Or(CAUSAL, s < sizes.prefix),
            mask_mod=lambda b, h, q, k: (k <= q) | (k < sizes.prefix),
        ),
        "soft_cap": Case(
            mask=CAUSAL,
            mask_mod=_causal,
            score=cap * sympy.tanh(x / cap),
            score_mod=lambda score, b, h, q, k: cap * torch.tanh(score / cap),
        ),
        "alibi": Case(
            mask=CAUSAL,
            mask_mod=_causal,
            score=x + Load(0, h) * (s - t),
            score_mod=lambda score, b, h, q, k: score + own[h] * (k - q),
            operand=per_head,
        ),
        "sink": Case(mask=CAUSAL, mask_mod=_causal, sink=Load(0, h), operand=per_head),
    }


class Problem:
    """The inputs of a case at one length, what is right, and the kernels."""

    def __init__(self, name: str, tokens: int, sizes: Sizes, setting: Setting) -> None:
        """Random queries, keys and values."""
        generator = torch.Generator(setting.device).manual_seed(setting.seed)
        shapes = [(heads, tokens) for heads in (sizes.query_heads, sizes.kv_heads, sizes.kv_heads)]
        self.q, self.k, self.v = (
            torch.randn(
                (1, *shape, sizes.head_dim), generator=generator, device=setting.device,
                dtype=setting.dtype,
            ).requires_grad_() for shape in shapes
        )  # fmt: skip
        self.grad = torch.randn(
            self.q.shape, generator=generator, device=setting.device, dtype=setting.dtype
        )
        make = cases(sizes, None)[name].operand
        self.operand = make(tokens, sizes, setting.device) if make else None
        self.case, self.setting = cases(sizes, self.operand)[name], setting
        self.operands = [] if self.operand is None else [self.operand]
        self.scale = sizes.head_dim**-0.5
        self.rows = torch.linspace(
            0, tokens - 1, min(SAMPLED, tokens), device=setting.device
        ).long()
        self.lists: Sequence[Tensor] = ()
        self.block_mask: Any = None
        self.compiled = (
            torch.compile(flex_attention, dynamic=False)
            if setting.device == "cuda"
            else flex_attention
        )

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        return self.q, self.k, self.v

    def prepare(self, kernel: str) -> None:
        """List the blocks that a kernel reads."""
        tokens, setting = self.q.shape[2], self.setting
        if kernel == OURS:
            self.lists = list_blocks(
                self.q, self.k, self.case.mask, tile=setting.tile, block_size=setting.block_size,
                operands=self.operands,
            )  # fmt: skip
        elif kernel == FLEX:
            self.block_mask = create_block_mask(
                self.case.mask_mod, 1, None, tokens, tokens, device=setting.device,
                _compile=setting.device == "cuda",
            )  # fmt: skip

    def run(self, kernel: str) -> Tensor:
        """The output."""
        q, k, v = self.inputs
        if not self.has_gradient(kernel):
            q, k, v = (one.detach() for one in self.inputs)
        if kernel == FUSED:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
            )
        if kernel == FLEX:
            out = self.compiled(
                q, k, v, score_mod=self.case.score_mod, block_mask=self.block_mask,
                scale=self.scale, enable_gqa=True,
                return_aux=None if self.case.sink is None else AuxRequest(lse=True),
            )  # fmt: skip
            if self.case.sink is None:
                return out
            values, more = out
            share = torch.sigmoid(more.lse - self.operands[0][:, None])
            return (values * share[..., None]).to(values.dtype)
        indices, counts, full = self.lists
        return block_sparse_attention(
            q, k, v, indices, counts, full_counts=full, tile=self.setting.tile,
            block_size=self.setting.block_size, mask=self.case.mask, score=self.case.score,
            sink=self.case.sink, operands=self.operands, scale=self.scale,
        )  # fmt: skip

    def sampled(self, out: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
        """What is compared: the output and dQ on some rows, all of dK and dV."""
        return [out[:, :, self.rows], grads[0][:, :, self.rows], *grads[1:]]

    def has_gradient(self, kernel: str) -> bool:
        """Whether a kernel has one here; flex_attention has none on the CPU."""
        return kernel != FLEX or self.setting.device == "cuda"

    def found(self, kernel: str) -> list[Tensor]:
        """What a kernel gives for it; the output alone if it has no gradient."""
        if not self.has_gradient(kernel):
            return [self.run(kernel)[:, :, self.rows]]
        out = self.run(kernel)
        grad = torch.zeros_like(out)
        grad[:, :, self.rows] = self.grad[:, :, self.rows]
        return self.sampled(out.detach(), torch.autograd.grad(out, self.inputs, grad))

    def truth(self) -> list[Tensor]:
        """The same in float64, one query head after another."""
        group = self.q.shape[1] // self.k.shape[1]
        rows = self.rows
        parts = []
        wide_k, wide_v = (one.detach().double().requires_grad_() for one in (self.k, self.v))
        for head in range(self.q.shape[1]):
            q = self.q.detach()[:, head : head + 1, rows].double().requires_grad_()
            k, v = (one[:, head // group][:, None] for one in (wide_k, wide_v))
            out = self._attend(q, k, v, head)
            out.backward(self.grad[:, head : head + 1, rows].double())
            parts.append((out.detach(), q.grad))
        out, dq = (torch.cat(part, 1) for part in zip(*parts, strict=True))  # type: ignore[arg-type]
        assert wide_k.grad is not None
        assert wide_v.grad is not None
        return [out, dq, wide_k.grad, wide_v.grad]

    def _env(self, rows: Tensor, head: int) -> dict[Any, Any]:
        device, keys = rows.device, self.k.shape[2]
        index = (torch.zeros(1), torch.full((1,), head), rows, torch.arange(keys))
        return {
            symbol: value.long().to(device).view([-1 if axis == i else 1 for i in range(4)])
            for axis, (symbol, value) in enumerate(zip(INDICES, index, strict=True))
        }

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
        scores = q @ k.mT * self.scale
        env = {**self._env(self.rows, head), x: scores}
        operands = [one.double() if one.is_floating_point() else one for one in self.operands]
        keep = evaluate(self.case.mask, env, operands)
        score = x if self.case.score is None else self.case.score
        logits = evaluate(score, env, operands, dtype=torch.float64).masked_fill(~keep, -torch.inf)
        if self.case.sink is None:
            return logits.softmax(-1) @ v
        sink = evaluate(self.case.sink, env, operands, dtype=torch.float64)
        together = torch.cat([logits, sink.expand(*logits.shape[:3], 1)], -1).softmax(-1)
        return together[..., :-1] @ v

    def kept(self) -> int:
        """Pairs of a query and a key that the mask keeps."""
        total = 0
        for first in range(0, self.q.shape[2], ROWS_AT_A_TIME):
            rows = torch.arange(first, min(first + ROWS_AT_A_TIME, self.q.shape[2]))
            env = self._env(rows.to(self.q.device), 0)
            total += int(evaluate(self.case.mask, env, self.operands).sum())
        return total


def relative_errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """Root mean squares of the differences, over those of the truth."""
    return [
        float((one.double() - right).square().mean().sqrt() / right.square().mean().sqrt())
        for one, right in zip(found, truth, strict=False)
    ]


def measure(
    problem: Problem, kernel: str, truth: Sequence[Tensor], natural: Sequence[float] | None
) -> common.Record:
    """Check one kernel, then time it.

    Args:
        problem: What to compute.
        kernel: With what.
        truth: What it must give.
        natural: The relative errors of PyTorch's own kernel; None: this kernel defines them.
    Returns:
        Fields of a record; `status` is "ok" or "wrong", and only "ok" has times.
    """
    setting = problem.setting
    problem.prepare(kernel)
    errors = relative_errors(problem.found(kernel), truth)
    found: common.Record = {"kernel": kernel, "status": "ok", "errors": errors}
    step = torch.finfo(setting.dtype).eps
    # nobody's to compare with: float32 has no wider sums, so that errors of many products remain
    first = step * (8 if setting.dtype == torch.float32 else 1)
    known = [*(natural or ()), *([first] * 4)]
    allowed = [ERROR_RATIO * one + step / 2 for one in known]
    if not all(one <= most for one, most in zip(errors, allowed, strict=False)):
        return found | {"status": "wrong", "allowed": allowed}

    def timed(call: Callable[[], object]) -> common.Timing:
        return common.time_calls(call, device=setting.device, n_calls=setting.n_calls, limit_s=4.0)

    def forward() -> None:
        with torch.no_grad():
            problem.run(kernel)

    timings = {"forward": timed(forward)}
    if problem.has_gradient(kernel):
        out = problem.run(kernel)
        timings["backward"] = timed(
            lambda: torch.autograd.grad(out, problem.inputs, problem.grad, retain_graph=True)
        )
    if kernel != FUSED:
        timings["lists"] = timed(lambda: problem.prepare(kernel))
    for name, timing in timings.items():
        found.update((f"{name}_{key}", value) for key, value in asdict(timing).items())
    return found


def run(
    names: Sequence[str], lengths: Sequence[int], sizes: Sizes, setting: Setting
) -> Iterator[common.Record]:
    """All records."""
    for tokens in lengths:
        for name in names:
            problem = Problem(name, tokens, sizes, setting)
            truth = problem.truth()
            program = ScoreProgram(
                keep=problem.case.mask, score=problem.case.score or x, sink=problem.case.sink
            )
            ranges = {one: sympy.Integer(tokens) for one in (t, s)}
            kept = problem.kept()
            about = {
                "case": name,
                "winner_case": winners.case_of(classify(program.keep, ranges), program),
                "tokens": tokens,
                "kept_share": kept / tokens**2,
                **asdict(sizes),
                "dtype": str(setting.dtype).removeprefix("torch."),
                "tile": setting.tile,
                "block_size": setting.block_size,
                "seed": setting.seed,
            }
            natural: Sequence[float] | None = None
            for kernel in (FLEX, OURS, *([FUSED] if problem.case.fused else [])):
                found = measure(problem, kernel, truth, natural)
                natural = natural or found["errors"]
                for way, products in (("forward", 2), ("backward", 5)):
                    ms = found.get(f"{way}_median_ms")
                    flops = 2 * products * kept * sizes.query_heads * sizes.head_dim
                    found[f"{way}_tflops"] = flops / ms / 1e9 if ms else None
                yield about | found
            del problem
            torch._dynamo.reset()
            if setting.device == "cuda":
                torch.cuda.empty_cache()


def table_of(records: Sequence[common.Record], device: str) -> list[winners.Winner]:
    """Which kernel won each case."""
    groups: dict[tuple[str, int], list[common.Record]] = {}
    for record in records:
        if "backward_median_ms" in record and record["kernel"] != FUSED:
            groups.setdefault((record["winner_case"], record["tokens"]), []).append(record)

    def fastest(group: Sequence[common.Record], *ways: str) -> Any:
        return min(group, key=lambda r: sum(r[f"{way}_median_ms"] for way in ways))["kernel"]

    return [
        winners.Winner(
            device=device,
            case=case,
            tokens=tokens,
            inference=fastest(group, "forward"),
            training=fastest(group, "forward", "backward"),
        )
        for (case, tokens), group in groups.items()
    ]


def show(records: Sequence[common.Record]) -> None:
    """Print the records as one table a length."""
    columns = ("case", "kernel", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "lists ms",
               "error", "worst gradient")  # fmt: skip
    for tokens in dict.fromkeys(record["tokens"] for record in records):
        rows = []
        for record in (r for r in records if r["tokens"] == tokens):
            keys = ("forward_median_ms", "forward_tflops", "backward_median_ms", "backward_tflops",
                    "lists_median_ms")  # fmt: skip
            cells = [record.get(key) for key in keys]
            if record["status"] != "ok":
                cells[0] = record["status"]
            out, *grads = record["errors"]
            rows.append(
                [
                    record["case"],
                    record["kernel"],
                    *cells,
                    f"{out:.1e}",
                    f"{max(grads):.1e}" if grads else None,
                ]
            )
        common.print_table(f"{tokens} tokens", columns, rows)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    known = list(cases(Sizes(), None))
    parser = common.parser("Block-sparse attention beside flex_attention and fused attention.")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--cases", nargs="+", default=known, choices=known)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--tile", type=int, default=128, help="queries that share a list")
    parser.add_argument("--block-size", type=int, default=128, help="keys of a KV block")
    parser.add_argument("--n-calls", type=int, default=10)
    parser.add_argument(
        "--write-table", action="store_true", help="write the winners for the planner"
    )
    for field, default in asdict(Sizes()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; returns 1 if a kernel gave a wrong result."""
    chosen = options(arguments)
    sizes = Sizes(**{field: getattr(chosen, field) for field in asdict(Sizes())})
    setting = Setting(
        device="cuda",
        dtype=torch.bfloat16,
        tile=chosen.tile,
        block_size=chosen.block_size,
        n_calls=chosen.n_calls,
        seed=chosen.seed,
    )
    if chosen.tiny:
        sizes = Sizes(
            query_heads=4, kv_heads=2, head_dim=16, window=32, chunk=24, document=40, prefix=20
        )
        setting = Setting(
            device="cpu", dtype=torch.float32, tile=16, block_size=16, n_calls=3, seed=chosen.seed
        )
        chosen.lengths = [130]
    else:
        try:
            check_gpu()
        except SparseCompileError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
    where = common.environment(setting.device)
    records = common.record_all(
        NAME, run(chosen.cases, chosen.lengths, sizes, setting), where, chosen.output,
        lambda record: f"{record['tokens']} {record['case']} {record['kernel']}: "
        f"{record['status']} "
        f"{[record.get(f'{way}_median_ms') for way in ('forward', 'backward')]}",
    )  # fmt: skip
    show(records)
    if chosen.write_table:
        path = common.ROOT / "sparse_compile" / winners.FILE
        winners.write(table_of(records, str(where["device"])), path)
    return common.exit_code(records)


if __name__ == "__main__":
    sys.exit(main())
