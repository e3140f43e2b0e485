"""The stages in order: shadow, detect, prove, plan, validate, rewrite; and the report of each."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from torch import fx

from sparse_compile import _compat, ir
from sparse_compile.inspect.report import (
    GraphReport,
    GraphSlice,
    PassTiming,
    SiteReport,
    SliceNode,
)
from sparse_compile.passes.candidates import Candidate, Declined
from sparse_compile.passes.detect import Found, find_candidates
from sparse_compile.passes.elements import ElementEvaluator
from sparse_compile.passes.equal_nodes import representatives
from sparse_compile.passes.mutation import frozen_nodes
from sparse_compile.passes.paged_sites import with_pages
from sparse_compile.passes.programs import Proven, prove
from sparse_compile.passes.provenance import UniqueNames, source_line
from sparse_compile.passes.rewrite import Replacement, rewrite
from sparse_compile.passes.shadow import Shadow, build_shadow
from sparse_compile.passes.sites import site_of
from sparse_compile.passes.validate import validate
from sparse_compile.policies import plan_site

if TYPE_CHECKING:
    from sparse_compile.config import Config

log = logging.getLogger(__name__)

_HINTS = ("softmax", "exp", "attention", "encoder_layer")


@dataclass
class _Work:
    """One site on its way through the stages."""

    found: Found
    site: ir.UnreadSite | ir.AttentionSite
    proven: Proven | None = None
    plan: ir.KernelPlan | None = None
    validation: str | None = None
    replacement: Replacement | None = None
    before: GraphSlice = field(default_factory=GraphSlice)

    def decline(self, reason: ir.Reason) -> None:
        self.site = msgspec.structs.replace(self.site, reason=reason)


@dataclass
class Outcome:
    """A rewritten graph: its report and the placeholders whose values were used."""

    report: GraphReport
    value_guards: tuple[int, ...] = ()


class _Clock:
    """Sums up the time of each stage."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - start) * 1e3

    def timings(self) -> tuple[PassTiming, ...]:
        return tuple(PassTiming(name=name, ms=ms) for name, ms in self.ms.items())


def run_passes(gm: fx.GraphModule, example_inputs: Sequence[Any] | None, config: Config) -> Outcome:
    """Run all stages over a Dynamo graph and the graphs nested in it; edits `gm`.

    If a pass raises, `gm` is put back as it was and the report carries the traceback.
    """
    clock = _Clock()
    backups: list[tuple[fx.GraphModule, fx.Graph]] = []
    names = UniqueNames()
    sites: list[SiteReport] = []
    guards: list[int] = []
    n_nodes = 0
    try:
        for graph_module, inputs in _graphs(gm, example_inputs):
            n_nodes += len(graph_module.graph.nodes)
            if not _may_hold_attention(graph_module.graph):
                continue
            backups.append((graph_module, copy_graph(graph_module.graph)))
            found, used = _run_until_valid(graph_module, inputs, config, clock, names)
            sites.extend(found)
            guards.extend(used if graph_module is gm else ())
    except Exception:
        for graph_module, graph in backups:
            graph_module.graph = graph
            graph_module.recompile()
        error = traceback.format_exc()
        return Outcome(GraphReport(sites=(), n_nodes=n_nodes, timings=clock.timings(), error=error))
    report = GraphReport(sites=tuple(sites), n_nodes=n_nodes, timings=clock.timings(), error=None)
    return Outcome(report, tuple(guards))


def _graphs(
    gm: fx.GraphModule, example_inputs: Sequence[Any] | None
) -> Iterator[tuple[fx.GraphModule, Sequence[Any] | None]]:
    """The graph and the bodies of its higher-order operators (checkpointing and the like)."""
    for node in list(gm.graph.nodes):
        if not _compat.is_higher_order(node.target) or "flex" in str(node.target):
            continue
        if "autograd_function" in str(node.target):
            continue  # forward and backward are written to match each other
        for arg in node.args:
            body = getattr(gm, str(arg.target), None) if isinstance(arg, fx.Node) else None
            if isinstance(body, fx.GraphModule):
                yield from _graphs(body, None)
    yield gm, example_inputs


def _may_hold_attention(graph: fx.Graph) -> bool:
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else _name(node.target)
        if node.op.startswith("call") and any(hint in name.lower() for hint in _HINTS):
            return True
    return False


def _name(target: Any) -> str:
    return getattr(target, "__name__", None) or str(target)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with its nodes' metadata."""
    fresh = fx.Graph()
    fresh.output(fresh.graph_copy(graph, {}))
    return fresh


class _ValidationFailed(Exception):
    """Sites whose replacement differs from the original, with the verdicts."""

    def __init__(self, sites: dict[str, str]) -> None:
        super().__init__(str(sites))
        self.sites = sites


def _run_until_valid(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any] | None,
    config: Config,
    clock: _Clock,
    names: UniqueNames,
) -> tuple[list[SiteReport], list[int]]:
    """Run the stages; sites that fail validation are left alone in a second run."""
    refused: dict[str, str] = {}
    while True:
        backup, taken = copy_graph(gm.graph), names.taken()
        try:
            return _run_one(gm, example_inputs, config, clock, names, refused)
        except _ValidationFailed as failed:
            names.restore(taken)
            refused.update(failed.sites)
            gm.graph = backup
            gm.recompile()


def _run_one(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any] | None,
    config: Config,
    clock: _Clock,
    names: UniqueNames,
    refused: Mapping[str, str],
) -> tuple[list[SiteReport], list[int]]:
    with clock.stage("shadow"):
        shadow = build_shadow(gm, example_inputs)
    with clock.stage("detect"):
        found = find_candidates(shadow)
    work = [_Work(f, _unread(f, shadow, names)) for f in found]
    evaluator = ElementEvaluator(
        shadow.constants,
        frozen_nodes(shadow.graph),
        same=representatives(shadow.graph, shadow.writes),
    )
    with clock.stage("prove"):
        for item in work:
            _prove(item, evaluator, shadow)
    with clock.stage("plan"):
        for item in work:
            if item.proven is not None:
                device = item.proven.candidate.out.node.meta["val"].device
                training = item.proven.candidate.out.node in shadow.differentiable
                own = config.for_site(item.site.name)
                item.plan = plan_site(item.proven, own, device=device, training=training)
    for item in work:
        if item.site.name in refused:
            item.validation = refused[item.site.name]
            item.decline(ir.Reason(code="validation-failed", message=item.validation))
    with clock.stage("rewrite"):
        jobs = [item for item in work if item.plan is not None and item.site.reason is None]
        for item in jobs:
            item.before = _slice_before(item.found, shadow)
        results = rewrite(gm, shadow, [(i.proven, i.plan) for i in jobs])  # type: ignore[misc]
        for item, result in zip(jobs, results, strict=True):
            item.replacement = result
            if result.reason is not None:
                item.decline(result.reason)
    if config.verify:
        with clock.stage("validate"):
            failed = dict(_validated(jobs, shadow))
        if failed:
            raise _ValidationFailed(failed)
    placeholders = gm.graph.find_nodes(op="placeholder")
    scalars = [node for node in shadow.constants if node.meta.get("value_used")]
    used = [*evaluator.value_guards, *scalars]
    guarded = {shadow.origins[node] for node in used if node in shadow.origins}
    guards = [i for i, node in enumerate(placeholders) if node in guarded]
    return [_report(item) for item in _one_per_softmax(work)], guards


def _one_per_softmax(work: Sequence[_Work]) -> Iterator[_Work]:
    """Products of the same weights with several V count as one site; a declined one speaks for all."""
    groups: dict[fx.Node, list[_Work]] = {}
    for item in work:
        groups.setdefault(item.found.anchor, []).append(item)
    for items in groups.values():
        yield next((item for item in items if item.site.reason is not None), items[0])


def _unread(found: Found, shadow: Shadow, names: UniqueNames) -> ir.UnreadSite:
    owner = shadow.owner(found.anchor)
    return ir.UnreadSite(
        name=names(owner),
        anchor=str(found.anchor.target),
        source=source_line(owner),
        reason=found.reason,
    )


def _prove(item: _Work, evaluator: ElementEvaluator, shadow: Shadow) -> None:
    if item.found.candidate is None:
        return
    try:
        proven = prove(item.found.candidate, evaluator, shadow.differentiable)
        item.proven = with_pages(proven, evaluator, shadow.differentiable)
    except Declined as declined:
        item.decline(declined.reason)
        return
    except Exception as error:
        log.warning("sparse_compile: %s could not be proven", item.site.name, exc_info=True)
        message = f"the proof failed with {type(error).__name__}: {error}"
        item.decline(ir.Reason(code="internal-error", message=message))
        return
    item.site = site_of(item.site, item.proven, shadow)


def _validated(jobs: Sequence[_Work], shadow: Shadow) -> Iterator[tuple[str, str]]:
    """Compare every replaced site with the original; yields those that differ."""
    for item in jobs:
        if item.proven is None or item.replacement is None or item.replacement.value is None:
            continue
        item.validation = validate(item.proven, shadow, item.replacement)
        if item.validation.startswith("failed"):
            yield item.site.name, item.validation


def _report(item: _Work) -> SiteReport:
    after = GraphSlice()
    if item.replacement is not None and item.site.reason is None:
        after = _slice_of(item.replacement.new, dict.fromkeys(item.replacement.new, "new"))
    return SiteReport.from_site(
        item.site, item.plan, before=item.before, after=after, validation=item.validation
    )


def _slice_before(found: Found, shadow: Shadow) -> GraphSlice:
    candidate = found.candidate
    assert isinstance(candidate, Candidate)
    roles: dict[fx.Node, Any] = {}
    for tensor, role in ((candidate.q, "q"), (candidate.k, "k"), (candidate.v, "v")):
        roles[shadow.owner(tensor.node)] = role
    for step in (*candidate.steps, *candidate.post):
        if step.term is not None:
            roles.setdefault(shadow.owner(step.term), "mask")
    for node in candidate.region:
        roles.setdefault(shadow.owner(node), "score")
    roles[shadow.owner(candidate.anchor)] = "softmax"
    roles[shadow.owner(candidate.out.node)] = "out"
    nodes = sorted(roles, key=lambda node: shadow.order[node])
    return _slice_of(nodes, roles)


def _slice_of(nodes: Sequence[fx.Node], roles: dict[fx.Node, Any]) -> GraphSlice:
    return GraphSlice(
        nodes=tuple(
            SliceNode(
                name=node.name,
                op=_name(node.target) if node.op != "placeholder" else "placeholder",
                inputs=tuple(source.name for source in node.all_input_nodes),
                role=roles[node],
            )
            for node in nodes
        )
    )
