"""One model through the passes: what was found, what was replaced, and whether it still agrees.

The rewritten Dynamo graph runs operator by operator, without Inductor's code generation, so a
thousand models take minutes a core; `sparse_compile` itself is measured elsewhere.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.zoo.entry import SEED, Entry
from benchmarks.zoo.truth import observe, tensors

TOLERANCE = 1e-5  # relative, what the issue promises for float32
GRADIENT_TOLERANCE = 1e-5
RECOMPILE_LIMIT = 64  # ours, so that what is measured is detection and not Dynamo's default of 8


@dataclass
class Outcome:
    """What one model gave; plain values only."""

    name: str
    package: str
    tags: list[str] = field(default_factory=list)
    true_sites: int = 0
    live_sites: int = 0  # of these, in Dynamo's graphs after dead code is gone
    single_key: int = 0  # sites with one key, not among the true ones
    explicit_sites: int = 0  # of these, with a softmax of their own
    escaped: int = 0
    mixed: int = 0
    found: int = 0  # sites of the graphs that ran
    rewritten: int = 0
    declined: dict[str, int] = field(default_factory=dict)  # reason code -> sites
    reasons: list[str] = field(default_factory=list)  # readable, one a distinct reason
    kernels: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    graph_breaks: list[str] = field(default_factory=list)
    pass_errors: list[str] = field(default_factory=list)  # exceptions inside our passes
    error: str = ""  # the model, the truth or Dynamo failed
    relative_error: float | None = None
    gradient_error: float | None = None
    double_errors: tuple[float, float] | None = None  # ours and eager's, against float64
    seconds: float = 0.0

    @property
    def false_positives(self) -> int:
        """Sites replaced beyond those that the eager run has."""
        return (
            0
            if "ambiguous" in self.tags
            else max(0, self.rewritten - self.true_sites - self.single_key)
        )

    @property
    def left(self) -> int:
        """Sites in graphs that were not replaced."""
        return max(0, self.live_sites - self.rewritten)

    @property
    def forced(self) -> int:
        """Those of them that must stay: by the model's tag, or their weights are returned or mixed."""
        if "declinable" in self.tags:
            return self.left
        return min(
            self.left, min(self.escaped, self.declined.get("weights-escape", 0)) + self.mixed
        )

    @property
    def missed(self) -> int:
        """Those of them that nothing forces to stay."""
        return self.left - self.forced

    @property
    def wrong(self) -> bool:
        """Whether outputs or gradients differ from eager's by more than eager is off by itself."""
        if self.gradient_error is not None and not self.gradient_error <= TOLERANCE:
            return True
        if self.relative_error is None or self.relative_error <= TOLERANCE:
            return False
        ours, eager = self.double_errors or (float("inf"), 0.0)
        return not ours <= 2 * eager

    def problems(self) -> list[str]:
        """What a test of this model complains about."""
        found = [self.error, *self.pass_errors]
        if self.false_positives:
            found.append(f"{self.false_positives} false positives")
        if self.missed and "ambiguous" not in self.tags:
            found.append(f"{self.rewritten} of {self.true_sites} sites replaced: {self.reasons}")
        if self.wrong:
            found.append(f"error {self.relative_error}, of gradients {self.gradient_error}")
        return [text for text in found if text]

    @classmethod
    def from_builtins(cls, record: dict[str, Any]) -> Outcome:
        """What `to_builtins` made; derived values are derived anew."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    def to_builtins(self) -> dict[str, Any]:
        """Plain JSON types, with the derived values."""
        return {
            **asdict(self),
            "false_positives": self.false_positives,
            "forced": self.forced,
            "missed": self.missed,
            "wrong": self.wrong,
        }


def check(entry: Entry, *, train: bool = False, options: dict[str, Any] | None = None) -> Outcome:
    """Count a model's sites in eager mode, run it through the passes, and compare.

    Args:
        entry: The model.
        train: Compare gradients too, in training mode with dropout at 0.
        options: Fields of `sparse_compile.Config`.
    """
    outcome = Outcome(entry.name, entry.package, sorted(entry.tags))
    try:
        model, args, kwargs = entry.build()
        torch.manual_seed(SEED)
        expected, truth = observe(model, args, kwargs)
        outcome.true_sites, outcome.explicit_sites = truth.count, truth.explicit
        outcome.escaped, outcome.mixed = truth.escaped, truth.mixed
        outcome.live_sites, outcome.single_key = truth.count, truth.degenerate
        _compare(outcome, model, args, kwargs, expected, options)
        if outcome.relative_error is not None and outcome.relative_error > TOLERANCE:
            outcome.double_errors = _double_errors(entry, options)
        if outcome.left:
            live, escaped = live_sites(model, args, kwargs)
            outcome.live_sites = min(truth.count, live)
            outcome.escaped = max(truth.escaped, escaped)
        if train:
            outcome.gradient_error = gradient_error(entry, options)
    except Exception as error:  # any model may fail in any way; the report says how
        outcome.error = _short(error)
    return outcome


def _compare(
    outcome: Outcome,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: Any,
    options: dict[str, Any] | None,
) -> None:
    from sparse_compile import last_report

    tally: list[Any] = []
    compiled = compile_without_inductor(model, tally, options)
    old = last_report()
    with torch.no_grad():
        torch.manual_seed(SEED)
        got = compiled(*args, **kwargs)
    report = last_report()
    graphs = report.graphs[len(old.graphs) :]
    outcome.graphs = len(graphs)
    breaks = report.graph_breaks[len(old.graph_breaks) :]
    outcome.graph_breaks = [str(brk.reason)[:200] for brk in breaks]
    outcome.pass_errors = [graph.error[-1500:] for graph in graphs if graph.error]
    record_sites(outcome, tally)
    outcome.relative_error = worst_difference(got, expected)


def _double_errors(entry: Entry, options: dict[str, Any] | None) -> tuple[float, float] | None:
    """Errors of ours and of eager against the model in float64; None where it does not run so."""

    def run(dtype: torch.dtype, compiled: bool) -> Any:
        def cast(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if is_float else value

        model, args, kwargs = entry.build()
        model, (args, kwargs) = model.to(dtype), pytree.tree_map(cast, (args, kwargs))
        torch.manual_seed(SEED)
        with torch.no_grad():
            called = compile_without_inductor(model, [], options) if compiled else model
            out = called(*args, **kwargs)
        return pytree.tree_map(
            lambda v: v.double() if isinstance(v, Tensor) else v, list(tensors(out))
        )

    try:
        truth = run(torch.float64, False)
        return tuple(worst_difference(run(torch.float32, c), truth) for c in (True, False))  # type: ignore[return-value]
    except Exception:  # some models compute in float32 whatever they are given
        return None


def live_sites(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Sites in the graphs that Dynamo gives to a backend, and how many of them return their weights.

    A backend cannot replace what a graph break tears apart, nor need it replace dead code. Behind a
    break, a function may be a graph of its own whose weights only its caller in Python drops.
    """
    counts: list[tuple[int, int]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        gm.graph.eliminate_dead_code()
        gm.recompile()

        def call(*inputs: Any) -> Any:
            out, truth = observe(gm, inputs, {})
            counts.append((truth.count, truth.escaped))
            return out

        return call

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return sum(count for count, _ in counts), sum(escaped for _, escaped in counts)


def record_sites(outcome: Outcome, tally: Sequence[Any]) -> None:
    """Add the sites of the graphs that ran to an outcome."""
    sites = [site for graph in tally for site in graph.sites]
    outcome.found = len(sites)
    outcome.rewritten = sum(site.status == "rewritten" for site in sites)
    left = [site for site in sites if site.status == "declined"]
    outcome.declined = dict(Counter(site.reason_code for site in left))
    outcome.reasons = sorted({f"{s.reason_code}: {s.reason} ({s.source})" for s in left})[:6]
    outcome.kernels = dict(Counter(site.kernel for site in sites if site.kernel))


def compile_without_inductor(
    model: nn.Module | Callable, tally: list[Any], options: dict[str, Any] | None = None
) -> Callable:
    """Compile with the passes alone; every graph's report joins `tally` each time it runs."""
    from sparse_compile import last_report
    from sparse_compile.backend import rewrite_only

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        before = len(last_report().graphs)
        run = rewrite_only(gm, example_inputs, options=options)
        graphs = last_report().graphs[before:]

        def call(*args: Any) -> Any:
            tally.extend(graphs)
            return run(*args)

        return call

    return torch.compile(model, backend=backend)


def gradient_error(entry: Entry, options: dict[str, Any] | None = None) -> float:
    """Worst difference of gradients, relative to the largest gradient of the model."""
    eager = _gradients(entry, lambda model: model)
    ours = _gradients(entry, lambda model: compile_without_inductor(model, [], options))
    top = max((float(g.abs().max()) for g in eager if g is not None and g.numel()), default=1.0)
    worst = 0.0
    for mine, reference in zip(ours, eager, strict=True):
        if (mine is None) != (reference is None):
            return float("inf")
        if mine is not None and mine.numel():
            worst = max(worst, float((mine - reference).abs().max()))
    return worst / max(top, 1e-30)


def _gradients(entry: Entry, wrap: Callable[[nn.Module], Callable]) -> list[Tensor | None]:
    model, args, kwargs = entry.build()
    given = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    has_weights = any(True for _ in model.parameters())
    inputs = [a for a in given if a.is_floating_point() and not has_weights]
    for tensor in inputs:
        tensor.requires_grad_(True)
    _train_without_dropout(model)
    torch.manual_seed(SEED)
    out = wrap(model)(*args, **kwargs)
    # A fixed random projection: a plain sum has no gradient through a last layer norm.
    make = torch.Generator().manual_seed(SEED)
    loss = torch.zeros(())
    for leaf in tensors(out):
        if leaf.is_floating_point() and leaf.requires_grad:
            loss = loss + (leaf * torch.randn(leaf.shape, generator=make)).sum()
    loss.backward()
    return [t.grad for t in (*model.parameters(), *inputs)]


def _train_without_dropout(model: nn.Module) -> None:
    """Training mode; dropped elements would differ between a fused kernel and the model's code."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in vars(holder).items() if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
                elif name == "apply_spec_augment":  # drops stretches of audio, longer than ours
                    setattr(holder, name, False)
    model.train()


def worst_difference(got: Any, expected: Any) -> float:
    """Largest error of any output, relative to the larger of 1 and the output's largest value.

    NaN and infinities must be equal and in the same places; anything else gives infinity.
    """
    ours, theirs = list(tensors(got)), list(tensors(expected))
    if len(ours) != len(theirs):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    if not a.is_floating_point() and not a.is_complex():
        return 0.0 if torch.equal(a, b) else float("inf")
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return float("inf")
    if not torch.equal(a[~finite].nan_to_num(nan=7.0), b[~finite].nan_to_num(nan=7.0)):
        return float("inf")
    a, b = a[finite].double(), b[finite].double()
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def _short(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(
        f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in frames[::-1]
    )
    return f"{type(error).__name__}: {str(error).strip()[:400]} @ {where}"


def inductor_fusions(entry: Entry) -> int | None:
    """Sites that Inductor's own pattern matcher replaces, in inference; None if it fails.

    Counted as fused attention operators after its joint passes minus those before, with code
    generation left out.
    """
    from torch._inductor import compile_fx as inductor

    gained: list[int] = []
    passes = inductor._recursive_joint_graph_passes

    def counted(gm: torch.fx.GraphModule, *rest: Any, **named: Any) -> Any:
        before = _fused_nodes(gm)
        result = passes(gm, *rest, **named)
        gained.append(_fused_nodes(gm) - before)
        return result

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        return inductor.compile_fx(gm, example_inputs, inner_compile=_run_as_is)

    inductor._recursive_joint_graph_passes = counted
    try:
        torch._dynamo.reset()
        model, args, kwargs = entry.build()
        with torch.no_grad():
            torch.compile(model, backend=backend)(*args, **kwargs)
    except Exception:  # what Inductor cannot compile counts as nothing
        return None
    finally:
        inductor._recursive_joint_graph_passes = passes
    return sum(gained)


def _run_as_is(gm: torch.fx.GraphModule, *_: Any, **__: Any) -> Callable:
    def call(args: Any) -> Any:
        return gm(*args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _fused_nodes(gm: torch.fx.GraphModule) -> int:
    return sum("scaled_dot_product" in str(node.target) for node in gm.graph.nodes)
