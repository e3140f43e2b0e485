"""Translation validation: run the model's own computation of a site and its replacement, compare.

Both sides read the same random tensors where Q, K, V and everything else enter; all arithmetic is
float64 wherever the operators allow it. A proof that is wrong shows as a difference of order one.

A replacement that selects KV blocks or pages is meant to differ. It is run with all of them selected,
where it must not: that checks all but which are chosen, and the verdict says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sparse_compile.passes.mutation import mutated_arguments, opaque, storage_root
from sparse_compile.passes.paged_sites import Paged

if TYPE_CHECKING:
    from sparse_compile.passes.programs import Proven
    from sparse_compile.passes.rewrite import Replacement
    from sparse_compile.passes.shadow import Shadow

SELECTION = "sparse_compile.top_k_selection.default"
PROGRESSIVE = "sparse_compile.progressive_attention_v1.default"
TOLERANCE = 1e-5  # casts to float32 inside the model leave errors of this order
MAX_ELEMENTS = 2**24  # a larger score tensor is not built
SEED = 0


def validate(proven: Proven, shadow: Shadow, replacement: Replacement) -> str:
    """Compare a site with what was written for it.

    Args:
        proven: The site.
        shadow: Its shadow.
        replacement: What was written for it.
    Returns:
        "passed: ...", "failed: ..." or "skipped: ...", with the reason.
    """
    elements = 1
    for size in proven.candidate.score_sizes():
        elements *= _hint_of_expression(size, shadow)
    if elements > MAX_ELEMENTS:
        return f"skipped: {elements} scores are too many to compute"
    if proven.candidate.dropout_p:
        return "skipped: dropout is random"
    inputs = _Inputs(shadow)
    runner = _Runner(inputs.of_shadow(proven), functools.partial(_earlier_writes, proven, shadow))
    try:
        original = runner.value(proven.candidate.out.node)
        inputs.shadow_values.update(
            (node, value) for node, value in runner.values.items() if mutated_arguments(node)
        )
    except Exception as error:
        return f"skipped: the original cannot be run on random inputs ({type(error).__name__})"
    try:
        assert replacement.value is not None
        ours = _Runner(inputs.of_dynamo(replacement)).value(replacement.value)
    except Exception as error:
        return f"failed: the replacement raised {type(error).__name__}: {error}"
    verdict = _compare(original, ours)
    targets = {str(node.target) for node in replacement.new}
    if SELECTION in targets:
        return f"{verdict}, with k covering all KV blocks"
    return f"{verdict}, with all pages read" if PROGRESSIVE in targets else verdict


def _compare(original: torch.Tensor, ours: torch.Tensor) -> str:
    if original.shape != ours.shape:
        return f"failed: shape {tuple(ours.shape)} instead of {tuple(original.shape)}"
    if not torch.equal(original.isnan(), ours.isnan()):
        return "failed: NaN in different places"
    difference = (original - ours).nan_to_num().abs().max().item() if original.numel() else 0.0
    size = max(1.0, original.nan_to_num().abs().max().item() if original.numel() else 0.0)
    verdict = "passed" if difference <= TOLERANCE * size else "failed"
    return f"{verdict}: max error {difference:.1e}"


def _earlier_writes(proven: Proven, shadow: Shadow, node: fx.Node) -> list[fx.Node]:
    """The attention's own writes into what a node reads, before it does."""
    found = []
    for source in node.all_input_nodes:
        for write in shadow.writes.get(storage_root(source), ()):
            is_own = write in proven.candidate.region
            if is_own and shadow.positions[write] < shadow.positions[node]:
                found.append(write)
    return found


class _Inputs:
    """Random values where a site's slice begins, the same for both graphs."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self.generator = torch.Generator().manual_seed(SEED)
        self.shadow_values: dict[fx.Node, Any] = {}

    def of_shadow(self, proven: Proven) -> Callable[[fx.Node], Any]:
        """Gives values for the shadow: leaves are random, everything else is computed."""
        leaves = {source.tensor.node for source in (proven.q, proven.k, proven.v)}
        if isinstance(proven.paged, Paged):  # the pages are random, and what is gathered is not
            leaves = {proven.q.tensor.node}

        def given(node: fx.Node) -> Any:
            leaf = node in leaves or node.op in ("placeholder", "get_attr")
            if not leaf and node.target is not opaque:
                return None
            if node not in self.shadow_values:
                self.shadow_values[node] = self._random(node)
            return self.shadow_values[node]

        return given

    def of_dynamo(self, replacement: Replacement) -> Callable[[fx.Node], Any]:
        """Gives the same values for the Dynamo graph."""
        recomputed = dict(replacement.recomputed)
        values = {
            recomputed[node]: value
            for node, value in self.shadow_values.items()
            if node in recomputed
        }
        for node, value in self.shadow_values.items():
            for dynamo in self.shadow.aliases.get(node, [self.shadow.origins.get(node)]):
                if dynamo is not None:
                    values[dynamo] = value

        def given(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            if node.op == "get_attr":
                attribute = getattr(node.graph.owning_module, str(node.target))
                return attribute if not isinstance(attribute, torch.Tensor) else _widened(attribute)
            if node.op == "placeholder":
                values[node] = self._random(node)
            return values.get(node)

        return given

    def _random(self, node: fx.Node) -> Any:
        value = node.meta.get("val", node.meta.get("example_value"))
        if node in self.shadow.constants:
            return _widened(self.shadow.constants[node].detach().cpu().clone())
        if not isinstance(value, torch.Tensor):
            return _hint(value)
        shape = [_hint(size) for size in value.shape]
        if value.dtype == torch.bool:
            return torch.rand(shape, generator=self.generator) < 0.8
        if value.dtype.is_floating_point:
            return torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return torch.randint(0, 2, shape, generator=self.generator).to(value.dtype)


class _Runner:
    """Computes a node's value by running what it depends on."""

    def __init__(
        self,
        given: Callable[[fx.Node], Any],
        earlier: Callable[[fx.Node], list[fx.Node]] = lambda node: [],
    ) -> None:
        self.given = given
        self.earlier = earlier  # what else has to run before a node
        self.values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        pending = [node]
        while pending:
            top = pending[-1]
            if top in self.values:
                pending.pop()
                continue
            found = self.given(top)
            if found is not None:
                self.values[top] = found.clone() if isinstance(found, torch.Tensor) else found
                continue
            needed = [*self.earlier(top), *top.all_input_nodes]
            missing = [source for source in needed if source not in self.values]
            if missing:
                pending.extend(missing)
                continue
            self.values[top] = self._run(top)
        return self.values[node]

    def _run(self, node: fx.Node) -> Any:
        def known(item: fx.Node) -> Any:
            return self.values[item]

        args: Sequence[Any] = pytree.tree_map_only(fx.Node, known, tuple(node.args))
        kwargs: Mapping[str, Any] = pytree.tree_map_only(fx.Node, known, dict(node.kwargs))
        kwargs = {k: "cpu" if k == "device" and v is not None else v for k, v in kwargs.items()}
        args, kwargs = pytree.tree_map_only(torch.dtype, _wide, (args, kwargs))
        if _counts_up(node):  # what was read before must keep its value
            args = (args[0].clone(), *args[1:])
        if node.op == "call_method":
            name = "double" if node.target in ("half", "bfloat16", "float") else str(node.target)
            result = getattr(args[0], name)(*args[1:], **kwargs)
        elif str(node.target) == SELECTION:
            result = node.target(*_of_all_blocks(*args))  # type: ignore[operator]
        elif str(node.target) == PROGRESSIVE:
            result = node.target(*_of_all_pages(node, args))  # type: ignore[operator]
        elif node.op == "call_function":
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            raise ValueError(f"{node.op} has no value here")
        return pytree.tree_map_only(torch.Tensor, _widened, result)


def _counts_up(node: fx.Node) -> bool:
    """Whether a node writes whole numbers into an input, such as the length of a cache."""
    written = mutated_arguments(node)
    return (
        len(written) == 1
        and written[0] is node.args[0]
        and storage_root(written[0]).op == "placeholder"
        and not node.meta["val"].is_floating_point()
    )


def _of_all_blocks(q: Any, k: Any, n_selected: int, block_size: int, *rest: Any) -> tuple[Any, ...]:
    """The arguments of a selection, with as many KV blocks to select as there are."""
    return q, k, -(-k.shape[2] // block_size), block_size, *rest


def _of_all_pages(node: fx.Node, args: Sequence[Any]) -> list[Any]:
    """The arguments of progressive attention, with all of the mass to read and no cap."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    changed: dict[str, Any] = {"p": 1.0, "max_pages": 0}
    return [changed.get(name, value) for name, value in zip(names, args, strict=True)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _widened(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.dtype.is_floating_point else value


def _hint(size: Any) -> Any:
    if isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size.node.hint
    return size


def _hint_of_expression(size: Any, shadow: Shadow) -> int:
    if size.is_Integer:
        return int(size)
    hints = {}
    for node in shadow.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        for found in sizes:
            if isinstance(found, torch.SymInt):
                hints[found.node.expr] = found.node.hint
    return int(size.xreplace(hints))
