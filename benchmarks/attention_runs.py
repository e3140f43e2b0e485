"""Checks one attention against sampled rows, then times it and measures its memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from sparse_compile.errors import OperatorError
from sparse_compile.integrations.memory import PeakMemory

if TYPE_CHECKING:
    from benchmarks.common import Record
    from benchmarks.peers import Peer
    from benchmarks.row_reference import Truth

# Twice the natural error and one rounding of the output, as in the tests. Others' kernels are timed
# with up to ten times that: they need not keep our promises, but must compute the same function.
ERROR_RATIO = {"ours": 2.0, "dense": 2.0, "peer": 20.0}
DENSE = {
    "dense_cudnn": "CUDNN_ATTENTION",
    "dense_flash2": "FLASH_ATTENTION",
}

Named = Mapping[str, Tensor]
Direction = Literal["forward", "backward", "step"]


class DeviceLostError(Exception):
    """A kernel broke the GPU's context; nothing more can run in this process."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a whole run has in common."""

    device: str
    dtype: torch.dtype
    n_calls: int
    seed: int
    limit_s: float = 0.4  # for the timed calls of one measurement


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of computing an attention; tensors in between lie as the way wants them."""

    name: str
    kind: Literal["ours", "dense", "peer"]
    run: Callable[[Named], Tensor]
    takes: tuple[str, ...] = ("q", "k", "v")
    heads_in: Callable[[Tensor], Tensor] = lambda x: x
    heads_out: Callable[[Tensor], Tensor] = lambda x: x
    directions: tuple[Direction, ...] = ("forward", "backward")
    refused: str | None = None  # why it cannot run here
    fields: Record = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs, and what a sample of rows of the output must be."""

    inputs: Named  # in the working dtype, [B, H, T, D]
    rows: Tensor
    grad_rows: Tensor  # gradient of those rows; that of all others is 0 where gradients are checked
    truth: Truth

    def grad_out(self, out: Tensor) -> Tensor:
        """The gradient of the output, [B, Hq, T, D], for the check."""
        return torch.zeros_like(out).index_copy(2, self.rows, self.grad_rows)


def peer_variant(peer: Peer, run: Callable[[Named], Tensor], group: int) -> Variant:
    """A library's way, in its layout."""
    return Variant(
        name=peer.name, kind="peer", run=run, heads_in=peer.heads_in, heads_out=peer.heads_out,
        refused=peer.refuses(group),
    )  # fmt: skip


def dense_variants(device: str, group: int) -> list[Variant]:
    """Causal attention of all keys, by the fastest kernels that PyTorch has."""

    def forced(backend: str) -> Callable[[Named], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run(x: Named) -> Tensor:
            with sdpa_kernel([getattr(SDPBackend, backend)]):
                return causal(x)

        return run

    def causal(x: Named) -> Tensor:
        return F.scaled_dot_product_attention(
            x["q"], x["k"], x["v"], is_causal=True, enable_gqa=group > 1
        )

    if device == "cpu":
        return [Variant(name="dense", kind="dense", run=causal)]
    return [Variant(name=name, kind="dense", run=forced(b)) for name, b in DENSE.items()]


def measure(variant: Variant, problem: Problem, setting: Setting) -> Iterator[Record]:
    """Check a variant, then time it; one record a direction.

    `status` is "ok", "wrong" (and not timed), "out of memory", "refused" or "failed"; the last two
    come with a `reason`.

    Raises:
        DeviceLostError: The GPU's context is broken.
    """
    known: Record = {"variant": variant.name, "kind": variant.kind, **variant.fields}
    if variant.refused:
        reason = {"status": "refused", "reason": variant.refused}
        yield from (known | {"direction": way} | reason for way in variant.directions)
        return
    done: list[str] = []
    try:
        for record in _measure(variant, problem, setting):
            done.append(record["direction"])
            yield known | record
        return
    except torch.OutOfMemoryError:
        found: Record = {"status": "out of memory"}
    except OperatorError as error:
        found = {"status": "refused", "reason": str(error).partition("\n")[0]}
    except Exception as error:  # whatever a kernel or a library raises: recorded, the rest goes on
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        found = {"status": "failed", "reason": text}
    yield from (known | {"direction": w} | found for w in variant.directions if w not in done)
    if setting.device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(f"{variant.name}: {error}") from error
        torch.cuda.empty_cache()


def _measure(variant: Variant, problem: Problem, setting: Setting) -> Iterator[Record]:
    inputs = {name: problem.inputs[name] for name in variant.takes}
    leaves = {name: variant.heads_in(x).detach().clone() for name, x in inputs.items()}
    start = time.perf_counter()
    with torch.no_grad():
        out = variant.heads_out(variant.run(leaves))
    found: Record = {"error": problem.truth.error("out", out[:, :, problem.rows])}
    found["natural_error"] = problem.truth.natural["out"]
    found["first_call_s"] = time.perf_counter() - start
    limit = _limit(variant, setting)
    correct = limit(found["error"], found["natural_error"])
    del out
    for direction in variant.directions:
        record = {"direction": direction, "status": "ok", **found}
        if direction != "forward" and correct:
            _enable_grad(leaves)
            record |= _check_gradients(variant, problem, leaves)
            errors = record["grad_errors"].items()
            correct = all(limit(e, record["natural_grad_errors"][name]) for name, e in errors)
        if not correct:
            yield record | {"status": "wrong"}
            continue
        timers = {"forward": _forward, "backward": _backward, "step": _step}
        yield record | timers[direction](variant, leaves, setting)


def _limit(variant: Variant, setting: Setting) -> Callable[[float, float], bool]:
    rounding = torch.finfo(setting.dtype).eps / 2
    ratio = ERROR_RATIO[variant.kind]
    # written so that NaN is too much
    return lambda error, natural: error <= ratio * (natural + rounding / 2)


def _enable_grad(leaves: Named) -> None:
    for x in leaves.values():
        x.requires_grad_()


def _check_gradients(variant: Variant, problem: Problem, leaves: Named) -> Record:
    """Errors of all gradients, of a loss on the sampled rows."""
    start = time.perf_counter()
    out = variant.run(leaves)
    grad_out = variant.heads_in(problem.grad_out(variant.heads_out(out.detach())))
    used = torch.autograd.grad(out, list(leaves.values()), grad_out)
    truth = problem.truth
    grads = {name: variant.heads_out(g) for name, g in zip(leaves, used, strict=True)}
    return {
        "grad_errors": {name: truth.error(name, grad) for name, grad in grads.items()},
        "natural_grad_errors": {name: truth.natural[name] for name in grads},
        "first_call_s": time.perf_counter() - start,
    }


def _forward(variant: Variant, leaves: Named, setting: Setting) -> Record:
    with torch.no_grad():
        with PeakMemory(setting.device) as peak:
            out = variant.run(leaves)
        n_bytes = out.nbytes
        del out
        timing = _time(lambda: variant.run(leaves), setting)
    return timing | {"extra_bytes": _above(peak, n_bytes)}


def _backward(variant: Variant, leaves: Named, setting: Setting) -> Record:
    before = _allocated(setting)
    out = variant.run(leaves)
    held = None if before is None else max(0, _allocated(setting) - before - out.nbytes)
    grad_out = torch.randn_like(out)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, list(leaves.values()), grad_out, retain_graph=True)

    with PeakMemory(setting.device) as peak:
        grads = call()
    n_bytes = sum(grad.nbytes for grad in grads)
    del grads
    return _time(call, setting) | {"extra_bytes": _above(peak, n_bytes), "held_bytes": held}


def _step(variant: Variant, leaves: Named, setting: Setting) -> Record:
    with torch.no_grad():
        grad_out = torch.randn_like(variant.run(leaves))

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(variant.run(leaves), list(leaves.values()), grad_out)

    with PeakMemory(setting.device) as peak:
        grads = call()
    n_bytes = grad_out.nbytes + sum(grad.nbytes for grad in grads)
    del grads
    return _time(call, setting) | {"extra_bytes": _above(peak, n_bytes)}


def _time(call: Callable[[], object], setting: Setting) -> Record:
    timing = common.time_calls(
        call, device=setting.device, n_calls=setting.n_calls, warm_up=2, limit_s=setting.limit_s
    )
    return common.timing_fields(timing)


def _above(peak: PeakMemory, n_bytes: int) -> int | None:
    """The peak without what was returned; the output of a step counts as returned."""
    return None if peak.n_bytes is None else max(0, peak.n_bytes - n_bytes)


def _allocated(setting: Setting) -> int | None:
    return torch.cuda.memory_allocated() if setting.device == "cuda" else None


def release(device: str) -> None:
    """Give cached memory back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def share(part: float | None, whole: float | None) -> float | None:
    """A quotient of measurements, None where one is missing."""
    return part / whole if part is not None and whole else None
