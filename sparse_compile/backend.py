"""The `torch.compile` backend, and `explain` and `last_report` beside it."""

from __future__ import annotations

import functools
import logging
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import fx

from sparse_compile import _compat, _support
from sparse_compile.config import Config
from sparse_compile.errors import (
    ConfigError,
    DeclinedSiteError,
    ModelError,
    SparseCompileError,
)
from sparse_compile.inspect.report import GraphBreak, GraphReport, Report
from sparse_compile.pipeline import Outcome, copy_graph, run_passes

_support.check_torch(torch.__version__)

log = logging.getLogger(__name__)


class _Session:
    """What was compiled in this process since the last `torch._dynamo.reset()`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self._graphs: list[tuple[GraphReport, tuple[GraphBreak, ...]]] = []

    def add(self, graph: GraphReport, breaks: Sequence[GraphBreak]) -> None:
        with self._lock:
            self._graphs.append((graph, tuple(breaks)))

    def remove(self, graph: GraphReport) -> None:
        """Forget a graph that Dynamo is going to trace again."""
        with self._lock:
            self._graphs = [known for known in self._graphs if known[0] is not graph]

    def take_back(self, graph: GraphReport, error: str) -> None:
        """A graph was not used after all: its sites are as the model wrote them."""
        reason = "the rewritten graph could not be compiled; see the graph's error"
        sites = tuple(
            msgspec.structs.replace(
                site, status="declined", reason_code="compile-failed", reason=reason,
                kernel=None, loop_order=None, why=None, policy=None, not_policy_code=None,
                not_policy_reason=None,
            )
            for site in graph.sites
        )  # fmt: skip
        kept = msgspec.structs.replace(graph, sites=sites, error=error)
        with self._lock:
            self._graphs = [(kept if g is graph else g, breaks) for g, breaks in self._graphs]

    def report(self) -> Report:
        with self._lock:
            graphs = tuple(graph for graph, _ in self._graphs)
            breaks = tuple(found for _, own in self._graphs for found in own)
        return Report(graphs=graphs, graph_breaks=breaks)


_session = _Session()


def sparse_compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its attention replaced; what `backend="sparse_compile"` calls.

    Args:
        gm: The torch-level graph from Dynamo; edited.
        example_inputs: Its inputs.
        mode: A `torch.compile` mode, passed through to Inductor.
        options: Fields of `Config`; `options["inductor"]` goes to Inductor.
    Returns:
        The compiled callable.
    Raises:
        ConfigError: `options` or `mode` is wrong.
        DeclinedSiteError: with `strict`, a site was left as it was or a pass failed.
    """
    config, patches = _settings(mode, options)

    def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return _compat.compile_with_inductor(graph, inputs, patches)

    return _compiled(gm, example_inputs, config, compile_graph)


def rewrite_only(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The same backend without Inductor: the rewritten graph runs operator by operator."""
    config, _ = _settings(mode, options)
    return _compiled(gm, example_inputs, config, lambda graph, inputs: graph.forward)


def _compiled(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    compile_graph: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """Rewrite a graph and compile it; guarded where a buffer's value was used in a proof."""
    original = fx.GraphModule(gm, copy_graph(gm.graph))
    outcome = _rewrite(gm, example_inputs, config)
    try:
        compiled = compile_graph(gm, example_inputs)
    except _compat.RestartAnalysis:  # Dynamo traces the frame again and calls us with the result
        _session.remove(outcome.report)
        raise
    except Exception as error:
        if not any(site.status == "rewritten" for site in outcome.report.sites):
            raise
        return _without_us(compile_graph, original, example_inputs, outcome.report, error)
    if not outcome.value_guards:
        return compiled
    fallback = functools.partial(compile_graph, original)
    return _guarded(compiled, example_inputs, outcome.value_guards, fallback)


def _without_us(
    compile_graph: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    original: fx.GraphModule,
    example_inputs: Sequence[Any],
    report: GraphReport,
    error: Exception,
) -> Callable[..., Any]:
    """Compile a graph as it was, after its rewritten form could not be compiled."""
    compiled = compile_graph(original, example_inputs)  # fails by itself: that error counts
    log.warning(
        "sparse_compile: the rewritten graph could not be compiled (%s: %s); it runs as it was",
        type(error).__name__,
        str(error).strip().splitlines()[0] if str(error).strip() else "",
    )
    _session.take_back(report, "".join(traceback.format_exception(error)))
    return compiled


def _settings(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Config, dict[str, Any]]:
    try:
        config = Config.from_options(options)
        return config, {**_mode_options(mode), **config.inductor}
    except SparseCompileError as error:
        raise _compat.unwrapped(error) from None


def _mode_options(mode: str | None) -> dict[str, Any]:
    try:
        return _compat.mode_options(mode)
    except RuntimeError as error:
        raise ConfigError(f"mode is {mode!r}. {error}") from None


def _rewrite(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Outcome:
    outcome = run_passes(gm, example_inputs, config)
    _session.add(outcome.report, graph_breaks(gm))
    if outcome.report.error is not None:
        log.warning(
            "sparse_compile: a pass failed; the graph is compiled as it was. Details: "
            "sparse_compile.last_report()\n%s",
            outcome.report.error.strip().splitlines()[-1],
        )
    if config.strict:
        _raise_if_declined(outcome.report)
    return outcome


def _raise_if_declined(report: GraphReport) -> None:
    declined = [site for site in report.sites if site.status == "declined"]
    if report.error is None and not declined:
        return
    lines = [f"{site.name}: {site.reason_code}: {site.reason} ({site.source})" for site in declined]
    if report.error is not None:
        lines.append(f"a pass failed: {report.error}")
    text = "\n  ".join(lines)
    raise _compat.unwrapped(
        DeclinedSiteError(
            f"strict is set and {len(lines)} of {len(report.sites)} sites stay as they are:\n  {text}\n"
            "  Expected every site to be replaced. Set strict=False to run them unchanged."
        )
    )


def graph_breaks(gm: fx.GraphModule) -> list[GraphBreak]:
    """The graph break after which a graph was compiled, if there was one."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return []
    stack = getattr(reason, "user_stack", None) or []
    source = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""
    return [GraphBreak(reason=str(reason.reason), source=source)]


def _guarded(
    compiled: Callable[..., Any],
    example_inputs: Sequence[Any],
    positions: Sequence[int],
    fallback: Callable[[Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """Run `compiled` while the buffers whose values were used are unchanged, else the fallback."""
    seen = {i: _version(example_inputs[i]) for i in positions}
    other: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if all(_version(args[i]) == version for i, version in seen.items()):
            return compiled(*args)
        if not other:
            log.warning("sparse_compile: a mask buffer has changed; its graph is compiled again")
            other.append(fallback(args))
        return other[0](*args)

    return call


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version


sparse_compile.reset = _session.clear  # type: ignore[attr-defined]  torch._dynamo.reset calls it
rewrite_only.reset = _session.clear  # type: ignore[attr-defined]


def last_report() -> Report:
    """What was compiled in this process since the last `torch._dynamo.reset()`.

    Returns:
        `report.graphs` in the order they were compiled, each with its `sites`; the graph breaks.
    """
    return _session.report()


def explain(
    model: Callable[..., Any],
    *args: Any,
    config: Config | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Run every stage over a model without replacing anything, and report.

    The model runs once, eagerly, on the given inputs. Dynamo's caches are reset before and after.

    Args:
        model: A module or function.
        args: Its inputs.
        config: Options as for the backend.
        kwargs: Its keyword inputs.
    Raises:
        ConfigError: `config` is wrong.
        ModelError: the model itself fails; the original exception is the cause.
        DeclinedSiteError: with `strict`, a site would be left as it is.
    """
    chosen = Config.from_options(config)
    graphs: list[GraphReport] = []
    breaks: list[GraphBreak] = []

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        copy = fx.GraphModule(gm, copy_graph(gm.graph))
        graphs.append(run_passes(copy, example_inputs, chosen).report)
        breaks.extend(graph_breaks(gm))
        return gm.forward

    torch._dynamo.reset()
    try:
        torch.compile(model, backend=collect)(*args, **kwargs)
    except Exception as error:
        _reraise_own(model, args, kwargs, error)
    finally:
        torch._dynamo.reset()
    report = Report(graphs=tuple(graphs), graph_breaks=tuple(breaks))
    if chosen.strict:
        for graph in graphs:
            _raise_if_declined(graph)
    return report


def _reraise_own(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception
) -> None:
    """Tell a model that fails by itself from one that only fails under Dynamo."""
    try:
        model(*args, **kwargs)
    except Exception as own:
        raise ModelError(
            f"the model fails in eager mode: {type(own).__name__}: {own}\n"
            "  Expected a model that runs on the given inputs. Fix it first; its traceback is above."
        ) from own
    raise error
