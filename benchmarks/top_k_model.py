"""A decoder under `top_k` beside dense attention: a long prompt, and one training step.

    python -m benchmarks.top_k_model                   # on a GPU: 8 layers of Llama, 32768 tokens
    python -m benchmarks.top_k_model --tiny            # on a CPU, in seconds, no code generated

Dense is the same model with F.scaled_dot_product_attention called by hand with the right flags,
compiled by Inductor; `exact` and `top_k` are eager attention under our backend. `top_k` computes
another function, so it is checked where it must not: at a length that its lists hold whole, with
lengths symbolic so that the same kernels run. Weights are random: nothing here speaks of quality,
see benchmarks/top_k_quality.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import common, models
from benchmarks.exact_prefill import ERROR_RATIO, ratio, relative_error, release, truth_of
from sparse_compile import backend
from sparse_compile._support import check_gpu
from sparse_compile.errors import SparseCompileError
from sparse_compile.integrations.memory import PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "top_k_model.json"
Step = Callable[[Callable[..., Any], torch.Tensor], object]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of running a model; without options, dense attention by hand through Inductor."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attention(self) -> str:
        """Transformers' name of the attention."""
        return "eager" if self.options else models.BY_HAND


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a whole run has in common."""

    device: str
    dtype: torch.dtype
    codegen: bool  # False: graphs are captured and rewritten, and run operator by operator
    n_calls: int
    seed: int
    k: int
    block_size: int

    def variants(self) -> tuple[Variant, ...]:
        """Dense first: it defines the natural error."""
        top_k = {"policy": "top_k", "k": self.k, "block_size": self.block_size}
        return (
            Variant(name="dense"),
            Variant(name="exact", options={"policy": "exact"}),
            Variant(name="top_k", options=top_k),
        )

    def compile(self, model: PreTrainedModel, variant: Variant, *, dynamic: bool = False) -> Any:
        """The model as a variant runs it."""
        model.set_attn_implementation(variant.attention)
        if not variant.options:
            return torch.compile(
                model, backend="inductor" if self.codegen else "aot_eager", dynamic=dynamic
            )
        ours = backend.sparse_compile if self.codegen else backend.rewrite_only
        return torch.compile(model, backend=ours, dynamic=dynamic, options=dict(variant.options))


def prefill(forward: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    """The last hidden state of a prompt."""
    with torch.no_grad():
        return forward(input_ids=ids, use_cache=False).last_hidden_state


def training_step(forward: Callable[..., Any], ids: torch.Tensor) -> None:
    """Forward and backward; gradients are written anew."""
    parameters = [parameter for parameter in forward.parameters() if parameter.requires_grad]  # type: ignore[attr-defined]
    for parameter in parameters:
        parameter.grad = None
    forward(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean().backward()


STEPS: dict[str, Step] = {"prefill": prefill, "training_step": training_step}


def check(model: PreTrainedModel, variant: Variant, setting: Setting) -> common.Record:
    """The error of a variant's output and gradients where all keys are selected, against float32.

    Gradients are compared as one vector, those of all parameters.
    """
    n_tokens = setting.k * setting.block_size
    ids = prompt(n_tokens, setting)
    truth = truth_of(model, ids, models.BY_HAND)
    model.set_attn_implementation(models.BY_HAND)
    models.cast_weights(model, torch.float32)
    training_step(model, ids)
    true_grads = gradients(model)
    models.cast_weights(model, setting.dtype)
    release()
    forward = setting.compile(model, variant, dynamic=True)
    error = relative_error(prefill(forward, ids), truth)
    training_step(forward, ids)
    found = gradients(model)
    model.zero_grad()
    return {
        "error": error,
        "gradient_error": float((found - true_grads).norm() / true_grads.norm()),
        "checked_tokens": n_tokens,
        "checked_kernels": kernels() if variant.options else [],
    }


def gradients(model: PreTrainedModel) -> torch.Tensor:
    """All gradients as one vector in float32; the model loses them."""
    parts = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return torch.cat(parts)


def kernels() -> list[str]:
    """Kernel and loop order of every kind of site in the last compilation."""
    sites = backend.last_report().sites
    return sorted({" ".join(filter(None, (s.kernel, s.loop_order))) or s.status for s in sites})


def measure(
    model: PreTrainedModel, variant: Variant, step: Step, ids: torch.Tensor, setting: Setting
) -> common.Record:
    """Time one kind of step of one variant."""
    release()
    found: common.Record = {"status": "ok"}
    try:
        forward = setting.compile(model, variant)
        step(forward, ids)
        if variant.options:
            found["kernels"] = kernels()
            found["why"] = sorted({site.why or "" for site in backend.last_report().sites})
        with PeakMemory(setting.device) as peak:
            step(forward, ids)
        timing = common.time_calls(
            lambda: step(forward, ids),
            device=setting.device,
            n_calls=setting.n_calls,
            warm_up=1,
            host_ahead=False,  # a whole model: its users wait for the host too
        )
    except torch.OutOfMemoryError:
        return found | {"status": "out of memory"}
    finally:
        model.zero_grad()
        release()
    return found | common.timing_fields(timing) | {"peak_bytes": peak.n_bytes}


def run(
    sizes: models.Sizes, lengths: Sequence[int], steps: Sequence[str], setting: Setting
) -> Iterator[common.Record]:
    """Check every variant, then time it at every length."""
    models.register_by_hand()
    model = models.build(models.causal(sizes), device=setting.device, seed=setting.seed)
    models.cast_weights(model, setting.dtype)
    natural: common.Record = {}
    checked: dict[str, common.Record] = {}
    for variant in setting.variants():
        checked[variant.name] = check(model, variant, setting)
        natural = natural or checked[variant.name]
        step = torch.finfo(setting.dtype).eps
        is_wrong = any(
            not checked[variant.name][name] <= ERROR_RATIO * natural[name] + step / 2
            for name in ("error", "gradient_error")
        )
        checked[variant.name]["is_wrong"] = is_wrong
    for n_tokens in lengths:
        ids = prompt(n_tokens, setting)
        for name in steps:
            dense_ms = None
            for variant in setting.variants():
                about = {
                    "step": name, "tokens": n_tokens, "variant": variant.name, **asdict(sizes),
                    "dtype": str(setting.dtype).removeprefix("torch."),
                    "codegen": setting.codegen, "seed": setting.seed, "options": variant.options,
                    "natural_error": natural["error"],
                    "natural_gradient_error": natural["gradient_error"],
                }  # fmt: skip
                found = dict(checked[variant.name])
                if found.pop("is_wrong"):
                    yield about | found | {"status": "wrong"}
                    continue
                found |= measure(model, variant, STEPS[name], ids, setting)
                if variant.name == "dense":
                    dense_ms = found.get("median_ms")
                yield about | found | {"speedup": ratio(dense_ms, found.get("median_ms"))}


def prompt(n_tokens: int, setting: Setting) -> torch.Tensor:
    """Random token ids, [1, T]."""
    generator = torch.Generator().manual_seed(setting.seed)
    return torch.randint(0, 1024, (1, n_tokens), generator=generator).to(setting.device)


def show(records: Sequence[common.Record]) -> None:
    """Print the records, a table for each kind of step."""
    columns = ("tokens", "", "ms", "p10", "p90", "over dense", "peak MiB", "error", "kernels")
    keys = ("tokens", "variant", "median_ms", "p10_ms", "p90_ms", "speedup")
    for step in dict.fromkeys(record["step"] for record in records):
        rows = []
        for record in (r for r in records if r["step"] == step):
            cells = [record.get(key) for key in keys]
            if record["status"] != "ok":
                cells[2] = record["status"]
            peak = record.get("peak_bytes")
            cells.append(None if peak is None else f"{peak / 2**20:.0f}")
            cells.append(f"{record['error']:.2e}")
            cells.append(", ".join(record.get("kernels", [])))
            rows.append(cells)
        common.print_table(step, columns, rows)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = common.parser("A decoder under the policy top_k beside dense attention.")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768])
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--n-calls", type=int, default=10)
    for name, default in asdict(models.Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return parser.parse_args(arguments)


def chosen_sizes(chosen: argparse.Namespace) -> tuple[models.Sizes, Setting]:
    """The sizes of the command line, on a GPU; or tiny ones, with which every line runs.

    Raises:
        UnsupportedEnvironmentError: There is no GPU.
    """
    if chosen.tiny:
        chosen.lengths = [96]
        small = models.Sizes(
            layers=1, hidden=32, intermediate=64, query_heads=4, kv_heads=2, head_dim=8
        )
        setting = Setting(
            device="cpu", dtype=torch.bfloat16, codegen=False, n_calls=3, seed=chosen.seed, k=3,
            block_size=16,
        )  # fmt: skip
        return small, setting
    check_gpu()
    setting = Setting(
        device="cuda", dtype=torch.bfloat16, codegen=True, n_calls=chosen.n_calls,
        seed=chosen.seed, k=chosen.k, block_size=chosen.block_size,
    )  # fmt: skip
    names = asdict(models.Sizes())
    return models.Sizes(**{name: getattr(chosen, name) for name in names}), setting


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; returns 1 if a variant gave a wrong result."""
    chosen = options(arguments)
    try:
        sizes, setting = chosen_sizes(chosen)
    except SparseCompileError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    where = common.environment(setting.device)
    records = common.record_all(
        NAME, run(sizes, chosen.lengths, chosen.steps, setting), where, chosen.output,
        lambda record: f"{record['step']} {record['tokens']} {record['variant']}: "
        f"{record['status']} {record.get('median_ms', '')}",
    )  # fmt: skip
    show(records)
    return common.exit_code(records)


if __name__ == "__main__":
    sys.exit(main())
