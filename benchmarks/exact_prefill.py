"""One long prompt through decoders with eager attention: time and peak memory, ours and others'.

    python -m benchmarks.exact_prefill                 # on a GPU, all lengths and masks
    python -m benchmarks.exact_prefill --tiny          # on a CPU, in seconds, no code generated

Causal: eager, torch.compile(inductor), ours, and the floor, which is the same model with
F.scaled_dot_product_attention called by hand with the right flags. Masks: window, chunk and soft
cap, inductor and ours. A result is compared with float32 before it is timed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import common, models
from sparse_compile import backend
from sparse_compile._support import check_gpu
from sparse_compile.errors import SparseCompileError
from sparse_compile.integrations.memory import PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "exact_prefill.json"
ERROR_RATIO = 2.0  # as in the tests: twice the natural error, and one rounding of the output


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of running a model."""

    name: str
    attention: str  # transformers' name
    compiler: str | None  # None: not compiled


FLOOR = Variant(name="floor", attention=models.BY_HAND, compiler="inductor")
OURS = Variant(name="sparse_compile", attention="eager", compiler="sparse_compile")
INDUCTOR = Variant(name="inductor", attention="eager", compiler="inductor")
EAGER = Variant(name="eager", attention="eager", compiler=None)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a whole run has in common."""

    device: str
    dtype: torch.dtype
    codegen: bool  # False: graphs are captured and rewritten, and run operator by operator
    n_calls: int
    seed: int

    def compile(self, model: PreTrainedModel, compiler: str | None) -> Callable[..., Any]:
        """The model as a variant runs it."""
        if compiler is None:
            return model
        ours = backend.sparse_compile if self.codegen else backend.rewrite_only
        others = "inductor" if self.codegen else "aot_eager"
        chosen = ours if compiler == "sparse_compile" else others
        return torch.compile(model, backend=chosen, dynamic=False)


@torch.no_grad()
def run(model: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    """The last hidden state of a prompt."""
    return model(input_ids=ids, use_cache=False).last_hidden_state


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference, over that of the truth.

    A truth for fewer tokens is compared with that many: no token depends on later ones.
    """
    actual = actual[:, : truth.shape[1]]
    return float((actual.float() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def truth_of(model: PreTrainedModel, ids: torch.Tensor, attention: str) -> torch.Tensor:
    """The same model in float32, not compiled."""
    dtype = next(model.parameters()).dtype
    model.set_attn_implementation(attention)
    models.cast_weights(model, torch.float32)
    try:
        return run(model, ids)
    finally:
        models.cast_weights(model, dtype)
        release()


def release() -> None:
    """Forget compiled code and give cached memory back."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    variant: Variant,
    model: PreTrainedModel,
    ids: torch.Tensor,
    truth: torch.Tensor,
    natural: float | None,
    setting: Setting,
) -> common.Record:
    """Check one variant, then time it.

    Args:
        variant: How to run it.
        model: In the working dtype.
        ids: The prompt.
        truth: What it must give, in float32.
        setting: What the whole run has in common.
        natural: The relative error that PyTorch's own kernels have; None: this variant defines it.
    Returns:
        Fields of a record; `status` is "ok", "out of memory" or "wrong", and only "ok" has times.
    """
    release()
    model.set_attn_implementation(variant.attention)
    forward = setting.compile(model, variant.compiler)
    found: common.Record = {"variant": variant.name, "status": "ok"}
    try:
        start = time.perf_counter()
        out = run(forward, ids)
        found["error"] = relative_error(out, truth)
        found["first_call_s"] = time.perf_counter() - start
        del out
        if variant.compiler == "sparse_compile":
            found.update(rewritten())
        step = torch.finfo(setting.dtype).eps
        if natural is not None and not found["error"] <= ERROR_RATIO * natural + step / 2:
            return found | {"status": "wrong"}
        with PeakMemory(setting.device) as peak:
            run(forward, ids)
        timing = common.time_calls(
            lambda: run(forward, ids),
            device=setting.device,
            n_calls=setting.n_calls,
            warm_up=1,
            host_ahead=False,  # a whole model: its users wait for the host too
        )
    except torch.OutOfMemoryError:
        return found | {"status": "out of memory"}
    finally:
        release()
    return found | common.timing_fields(timing) | {"peak_bytes": peak.n_bytes}


def rewritten() -> common.Record:
    """What became of the sites of the last compilation."""
    report = backend.last_report()
    return {
        "sites": len(report.sites),
        "rewritten": len(report.rewritten),
        "kernels": sorted({site.kernel for site in report.rewritten if site.kernel}),
        "masks": sorted({site.mask for site in report.rewritten}),
    }


def causal_section(
    sizes: models.Sizes, lengths: Sequence[int], setting: Setting
) -> Iterator[common.Record]:
    """Llama with every token reading all tokens before it."""
    models.register_by_hand()
    model = build(models.causal(sizes), setting)
    rate = matmul_flops_per_s(setting)
    for n_tokens in lengths:
        ids = prompt(n_tokens, setting)
        truth = truth_of(model, ids, models.BY_HAND)
        natural, floor_ms = None, None
        for variant in (FLOOR, OURS, INDUCTOR, EAGER):
            found = measure(variant, model, ids, truth, natural, setting)
            if variant is FLOOR:
                natural, floor_ms = found.get("error"), found.get("median_ms")
            yield describe("causal", sizes, n_tokens, setting) | {
                **found,
                "natural_error": natural,
                "over_floor": ratio(found.get("median_ms"), floor_ms),
                "roof_ms": sizes.flops(n_tokens) / rate * 1e3,
                "roof_share": ratio(sizes.flops(n_tokens) / rate * 1e3, found.get("median_ms")),
                "matmul_flops_per_s": rate,
            }


def mask_section(
    sizes: models.Sizes, lengths: Sequence[int], width: int, setting: Setting
) -> Iterator[common.Record]:
    """Masks and score transforms that F.scaled_dot_product_attention has no flag for.

    Eager attention in float32 fits for the shortest length: its tokens, with which the longer
    prompts begin, are compared at every length.
    """
    makers = {"window": models.window, "chunk": models.chunk, "soft_cap": models.soft_cap}
    for name, make in makers.items():
        model = build(make(sizes, width), setting)
        first = prompt(min(lengths), setting)
        truth = truth_of(model, first, "eager")
        natural = relative_error(run(model, first), truth)
        for n_tokens in lengths:
            ids = prompt(n_tokens, setting)
            for variant in (OURS, INDUCTOR):
                found = measure(variant, model, ids, truth, natural, setting)
                about = describe(name, sizes, n_tokens, setting)
                yield about | {"width": width, "natural_error": natural} | found
        del model
        release()


def build(config: Any, setting: Setting) -> PreTrainedModel:
    """A model in the working dtype."""
    model = models.build(config, device=setting.device, seed=setting.seed)
    models.cast_weights(model, setting.dtype)
    return model


def prompt(n_tokens: int, setting: Setting) -> torch.Tensor:
    """Random token ids, [1, T]; a longer prompt begins with the shorter ones."""
    generator = torch.Generator().manual_seed(setting.seed)
    return torch.randint(0, 1024, (1, n_tokens), generator=generator).to(setting.device)


def describe(mask: str, sizes: models.Sizes, n_tokens: int, setting: Setting) -> common.Record:
    """The parameters of a measurement."""
    return {
        "mask": mask,
        "tokens": n_tokens,
        "batch": 1,
        **asdict(sizes),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "codegen": setting.codegen,
        "seed": setting.seed,
    }


def matmul_flops_per_s(setting: Setting) -> float:
    """What a large matrix product reaches on this device: the roof."""
    size = 8192 if setting.device == "cuda" else 256
    a, b = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    timing = common.time_calls(lambda: a @ b, device=setting.device, cold_l2=False)
    return 2 * size**3 / timing.median_ms * 1e3


def ratio(over: float | None, under: float | None) -> float | None:
    """A quotient of measurements, None where one is missing."""
    return over / under if over is not None and under else None


def show(records: Sequence[common.Record]) -> None:
    """Print the records as two tables."""
    columns = ("tokens", "", "ms", "p10", "p90", "over floor", "share of roof", "peak MiB", "error")
    keys = ("tokens", "variant", "median_ms", "p10_ms", "p90_ms", "over_floor", "roof_share")
    for mask in dict.fromkeys(record["mask"] for record in records):
        rows = []
        for record in (r for r in records if r["mask"] == mask):
            cells = [record.get(key) for key in keys]
            if record["status"] != "ok":
                cells[2] = record["status"]
            peak = record.get("peak_bytes")
            error = record.get("error")
            cells.append(None if peak is None else f"{peak / 2**20:.0f}")
            cells.append(None if error is None else f"{error:.2e}")
            rows.append(cells)
        common.print_table(mask, columns, rows)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = common.parser("Time and peak memory of one long prompt, eager attention compiled.")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--sections", nargs="+", default=["causal", "masks"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 32768])
    parser.add_argument("--mask-lengths", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--width", type=int, default=1024, help="of the window and the chunk")
    parser.add_argument("--n-calls", type=int, default=10)
    for field, default in asdict(models.Sizes()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--mask-layers", type=int, default=2)
    parser.add_argument("--mask-query-heads", type=int, default=16)
    parser.add_argument("--mask-kv-heads", type=int, default=4)
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.sections) - {"causal", "masks"}
    if unknown:
        parser.error(f"--sections: {', '.join(sorted(unknown))} is none of causal, masks")
    return chosen


def tiny(chosen: argparse.Namespace) -> tuple[models.Sizes, models.Sizes, Setting]:
    """Sizes with which every line of this program runs in seconds."""
    small = models.Sizes(
        layers=2, hidden=32, intermediate=64, query_heads=4, kv_heads=2, head_dim=8
    )
    chosen.lengths, chosen.mask_lengths, chosen.width = [96], [48], 16
    setting = Setting(
        device="cpu", dtype=torch.bfloat16, codegen=False, n_calls=3, seed=chosen.seed
    )
    return small, small, setting


def full(chosen: argparse.Namespace) -> tuple[models.Sizes, models.Sizes, Setting]:
    """The sizes of the command line, on a GPU.

    Raises:
        UnsupportedEnvironmentError: There is no GPU.
    """
    check_gpu()
    sizes = models.Sizes(**{field: getattr(chosen, field) for field in asdict(models.Sizes())})
    masks = replace(
        sizes,
        layers=chosen.mask_layers,
        query_heads=chosen.mask_query_heads,
        kv_heads=chosen.mask_kv_heads,
    )
    setting = Setting(
        device="cuda",
        dtype=torch.bfloat16,
        codegen=True,
        n_calls=chosen.n_calls,
        seed=chosen.seed,
    )
    return sizes, masks, setting


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; returns 1 if a variant gave a wrong result."""
    chosen = options(arguments)
    try:
        sizes, mask_sizes, setting = tiny(chosen) if chosen.tiny else full(chosen)
    except SparseCompileError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    where = common.environment(setting.device)
    sections = {
        "causal": lambda: causal_section(sizes, chosen.lengths, setting),
        "masks": lambda: mask_section(mask_sizes, chosen.mask_lengths, chosen.width, setting),
    }
    found = (record for name in chosen.sections for record in sections[name]())
    records = common.record_all(
        NAME, found, where, chosen.output,
        lambda record: f"{record['mask']} {record['tokens']} {record['variant']}: "
        f"{record['status']} {record.get('median_ms', '')}",
    )  # fmt: skip
    show(records)
    return common.exit_code(records)


if __name__ == "__main__":
    sys.exit(main())
