"""What the stages found, proved and planned: values that print, convert to JSON and to HTML."""

from __future__ import annotations

import math
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import sympy

from sparse_compile import ir
from sparse_compile.errors import SparseCompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console, ConsoleOptions, RenderResult

REPORT_VERSION = 1

Role = Literal["q", "k", "v", "mask", "score", "softmax", "weights", "out", "new", ""]
Status = Literal["rewritten", "declined"]

_NO_PLAN = ir.Reason(code="no-plan", message="the planner gave no kernel for this site")


class SliceNode(msgspec.Struct, frozen=True, kw_only=True):
    """One operation of a site's piece of the graph."""

    name: str  # unique in its slice
    op: str  # readable, e.g. "softmax" or "placeholder"
    inputs: tuple[str, ...]  # names of other nodes; those outside the slice are not drawn
    role: Role = ""

    def __str__(self) -> str:
        return f"{self.name} = {self.op}({', '.join(self.inputs)})"


class GraphSlice(msgspec.Struct, frozen=True, kw_only=True):
    """The piece of a graph around a site, in execution order."""

    nodes: tuple[SliceNode, ...] = ()

    def __str__(self) -> str:
        return "; ".join(str(node) for node in self.nodes)


class PassTiming(msgspec.Struct, frozen=True, kw_only=True):
    """How long one pass ran over one graph."""

    name: str
    ms: float

    def __str__(self) -> str:
        return f"{self.name} {self.ms:.1f} ms"


class SiteReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one attention site, and why."""

    name: str  # module path
    status: Status
    reason_code: str | None = None
    reason: str | None = None
    # what the site computes; None where it was declined before that was proven
    mask: str | None = None
    query_heads: int | str | None = None  # a string where the size is symbolic
    kv_heads: int | str | None = None
    group: int | str | None = None
    scale: float | None = None
    score_transforms: tuple[str, ...] = ()  # in the order they are applied
    kv_source: str | None = None
    kernel: str | None = None
    loop_order: str | None = None
    why: str | None = None  # the planner's words
    policy: str | None = None  # that the kernel keeps to: exact, top_k
    not_policy_code: str | None = None  # why that is not the policy that was asked for
    not_policy_reason: str | None = None
    source: str = ""  # file:line of the model's code
    site: ir.AttentionSite | None = None  # all that is proven
    before: GraphSlice = GraphSlice()
    after: GraphSlice = GraphSlice()
    validation: str | None = None  # None: not run; "passed: ..." or "failed: ..."

    @classmethod
    def from_site(
        cls,
        site: ir.AttentionSite | ir.UnreadSite,
        plan: ir.KernelPlan | None,
        *,
        before: GraphSlice = GraphSlice(),  # noqa: B008 - frozen
        after: GraphSlice = GraphSlice(),  # noqa: B008 - frozen
        validation: str | None = None,
    ) -> SiteReport:
        """The report of a site: declined if it has a reason or no plan, else rewritten."""
        reason = site.reason or (_NO_PLAN if plan is None else None)
        kept = plan if reason is None else None
        outcome = cls(
            name=site.name,
            status="declined" if reason else "rewritten",
            reason_code=reason.code if reason else None,
            reason=reason.message if reason else None,
            kernel=kept.kernel if kept else None,
            loop_order=(kept.loop_order or None) if kept else None,
            why=kept.why if kept else None,
            policy=kept.policy if kept else None,
            not_policy_code=kept.not_policy.code if kept and kept.not_policy else None,
            not_policy_reason=kept.not_policy.message if kept and kept.not_policy else None,
            source=site.source,
            before=before,
            after=after,
            validation=validation,
        )
        if isinstance(site, ir.UnreadSite):
            return outcome
        return msgspec.structs.replace(
            outcome,
            site=site,
            mask=_named(str(site.mask), site.operands),
            query_heads=size(site.query_heads),
            kv_heads=size(site.kv_heads),
            group=size(site.group),
            scale=float(site.scale),
            score_transforms=tuple(str(transform) for transform in site.transforms),
            kv_source=site.kv_source,
        )

    @property
    def query_tokens(self) -> int | str | None:
        """Query tokens of each sequence; None where not proven."""
        return size(self.site.query_tokens) if self.site else None

    @property
    def key_tokens(self) -> int | str | None:
        """Key tokens of each sequence; None where not proven."""
        return size(self.site.key_tokens) if self.site else None

    @property
    def head_dim(self) -> int | str | None:
        """Size of one head of Q and K; None where not proven."""
        return size(self.site.head_dim) if self.site else None

    @property
    def failed_validation(self) -> bool:
        """The numeric check ran and found a difference."""
        return self.validation is not None and self.validation.startswith("failed")

    def __str__(self) -> str:
        if self.status == "declined":
            return f"{self.name}: declined, {self.reason_code}: {self.reason}"
        return f"{self.name}: {self.kernel}, mask {self.mask}, {self.why}"


class GraphBreak(msgspec.Struct, frozen=True, kw_only=True):
    """A place where Dynamo ended one graph and began another."""

    reason: str
    source: str  # file:line

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" if self.source else self.reason


class GraphReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in one compiled graph."""

    sites: tuple[SiteReport, ...] = ()
    n_nodes: int = 0
    timings: tuple[PassTiming, ...] = ()
    error: str | None = None  # a pass failed: its traceback; the graph was left untouched

    @property
    def pass_ms(self) -> float:
        """Time spent in our passes, in milliseconds."""
        return sum(timing.ms for timing in self.timings)

    def __str__(self) -> str:
        state = "a pass failed" if self.error else f"{len(self.sites)} sites"
        return f"graph of {self.n_nodes} nodes: {state}, {self.pass_ms:.1f} ms"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in all graphs of a model; prints as a table."""

    graphs: tuple[GraphReport, ...] = ()
    graph_breaks: tuple[GraphBreak, ...] = ()
    version: int = REPORT_VERSION

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """The sites of all graphs, in the order they were compiled."""
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def rewritten(self) -> tuple[SiteReport, ...]:
        """The sites that were (or would be) replaced."""
        return tuple(site for site in self.sites if site.status == "rewritten")

    @property
    def declined(self) -> tuple[SiteReport, ...]:
        """The sites that were left as they were."""
        return tuple(site for site in self.sites if site.status == "declined")

    @property
    def errors(self) -> tuple[str, ...]:
        """Tracebacks of passes that failed."""
        return tuple(graph.error for graph in self.graphs if graph.error)

    @property
    def failed_validations(self) -> tuple[SiteReport, ...]:
        """Sites whose numeric check found a difference."""
        return tuple(site for site in self.sites if site.failed_validation)

    def __str__(self) -> str:
        from sparse_compile.inspect import text

        return text.render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from sparse_compile.inspect import text

        yield from text.renderables(self, width=options.max_width)

    def to_json(self) -> str:
        """The whole report as JSON with stable keys; `from_json` reads it back."""
        data = _map_numbers(ir.to_builtins(self), _finite_or_text)
        return msgspec.json.format(msgspec.json.encode(data)).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """The inverse of `to_json`; sympy evaluates the formulas, so read only files you trust.

        Raises:
            SparseCompileError: `text` is no report, or one of another version.
        """
        try:
            data = msgspec.json.decode(text)
            version = data.get("version") if isinstance(data, dict) else None
            if version == REPORT_VERSION:
                return ir.from_builtins(_map_numbers(data, _number), cls)
        except (msgspec.MsgspecError, sympy.SympifyError) as error:
            raise SparseCompileError(
                f"This is no report of sparse_compile: {error}.\n"
                "  Expected what `Report.to_json` or `inspect --json` wrote."
            ) from error
        raise SparseCompileError(
            f"A report of version {version!r} cannot be read.\n"
            f"  Expected version {REPORT_VERSION}; write it again with this sparse_compile."
        )

    def to_html(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Write one self-contained HTML file.

        Args:
            path: The file; it appears whole or not at all.
            title: What was inspected, for the heading.
        """
        from sparse_compile.inspect import html

        write_atomically(path, html.render(self, title=title))


def size(value: sympy.Basic) -> int | str:
    """A size as a number, or as text where it is symbolic."""
    return int(value) if value.is_Integer else str(value)


def _named(text: str, operands: tuple[ir.Operand, ...]) -> str:
    """`text` with the names of operands in place of `operand0`."""

    def name(match: re.Match[str]) -> str:
        number = int(match[1])
        return operands[number].name if number < len(operands) else match[0]

    return re.sub(r"\boperand(\d+)\b", name, text)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    partial = Path(name)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        partial.chmod(0o666 & ~_umask())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's file mode mask; reading it means setting it for a moment."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


# JSON has no infinity, and a mask's fill value is often one.
_NUMBERS = frozenset({"fill", "scale"})


def _map_numbers(data: Any, change: Callable[[Any], Any]) -> Any:
    """`data` with `change` applied to the number fields that may be infinite."""

    def entries(mapping: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, value in mapping.items():
            yield key, change(value) if key in _NUMBERS else _map_numbers(value, change)

    if isinstance(data, dict):
        return dict(entries(data))
    if isinstance(data, (list, tuple)):
        return [_map_numbers(value, change) for value in data]
    return data


def _finite_or_text(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value
