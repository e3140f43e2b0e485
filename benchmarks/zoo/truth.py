"""How many attention sites an eager run has, found by following values, not code.

A site is a softmax (however it is spelled) of scores that came out of a contraction of two
activations, whose weights are contracted with values over the softmax's own axis; or one call of
a fused attention operator. Softmaxes of routers, classifiers, gates, linear attention and slot
attention are none.

Every softmax output carries a *tracer*, an integer tensor of the same shape that holds the place
of each element in that softmax. Operators that move data move the tracer alike, element-wise ones
broadcast it, so at a matrix product one look at the tracer tells which axis is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

SOFTMAX = {"_softmax", "softmax", "_safe_softmax"}
LOG_SOFTMAX = {"_log_softmax", "log_softmax"}
CONTRACTION = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot"}
MOVEMENT = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand",
    "unsqueeze", "squeeze", "slice", "select", "narrow", "split", "split_with_sizes", "chunk",
    "unbind", "clone", "alias", "detach", "cat", "stack", "flip", "roll", "index_select", "gather",
    "index", "repeat", "as_strided", "constant_pad_nd", "unfold", "diagonal", "contiguous",
    "_to_copy", "lift_fresh", "movedim", "unflatten", "squeeze_", "unsqueeze_", "transpose_",
    "slice_scatter", "select_scatter", "expand_as", "view_as", "repeat_interleave", "copy",
}  # fmt: skip
SUMS = {"sum", "mean"}
FUSED = {
    "scaled_dot_product_attention",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
}
FUSED_KERNELS = (
    "_scaled_dot_product",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)
PROJECTIONS = {"linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
               "conv_transpose2d", "conv_transpose3d", "embedding", "embedding_bag"}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One attention that the run computed."""

    module: str
    kind: str  # "fused", "matmul" or "product_sum"
    shape: tuple[int, ...] = ()  # of the softmax, () when fused
    keys: int = 0  # size of the softmax's axis, or of a fused operator's keys

    @property
    def single_key(self) -> bool:
        """There is nothing to attend to but one key."""
        return self.keys == 1


@dataclass
class Truth:
    """What one eager run contained."""

    sites: list[Site] = field(default_factory=list)
    degenerate: int = 0  # sites with a single key: their softmax is one everywhere
    softmaxes: int = 0
    escaped: int = 0  # sites whose weights are among the model's outputs
    mixed: int = 0  # sites whose weights are mixed over heads before the values

    @property
    def count(self) -> int:
        """Number of sites of the run."""
        return len(self.sites)

    @property
    def explicit(self) -> int:
        """Sites with a softmax of their own, without fused operators."""
        return sum(site.kind != "fused" for site in self.sites)


@dataclass(eq=False)
class _Softmax:
    """One softmax seen: what its tracers point into."""

    shape: tuple[int, ...]
    dim: int  # -1: an exponential whose axis is not known yet
    scored: bool
    module: str
    place: int  # position among the sites, so that order is the order of the softmaxes
    site: Site | None = None
    mixed: bool = False

    def along(self, tracer: Tensor, axis: int, dim: int) -> bool:
        """Whether `tracer`'s axis `axis` runs over this softmax's axis `dim`, and only it."""
        rows = tracer.movedim(axis, -1).reshape(-1, tracer.shape[axis])
        stride = 1
        for size in self.shape[dim + 1 :]:
            stride *= size
        size = self.shape[dim]
        live = rows >= 0
        place = torch.where(live, rows // stride % size, -1)
        rest = torch.where(live, rows - place * stride, -1)
        if size == 1:
            return bool((live.sum(-1) == 1).any())
        same_row = (rest == rest.amax(-1, keepdim=True)) | ~live
        ordered = place.sort(-1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        good = same_row.all(-1) & ~twice.any(-1) & (live.sum(-1) > 1)
        return bool(good.any())


@dataclass
class _Tags:
    """What is known of one tensor."""

    weights: dict[_Softmax, Tensor] = field(default_factory=dict)  # normalised
    powers: dict[_Softmax, Tensor] = field(default_factory=dict)  # exp(scores), not normalised
    logs: dict[_Softmax, Tensor] = field(default_factory=dict)  # log of the weights
    sums: dict[_Softmax, int] = field(default_factory=dict)  # sum of powers over an axis
    summed: dict[_Softmax, int] = field(default_factory=dict)  # powers @ values over an axis
    scored: bool = False  # came out of a contraction of two activations
    outer: bool = False  # a product in which both factors were broadcast

    def any(self) -> bool:
        """Whether anything is known."""
        return (
            bool(self.weights or self.powers or self.logs or self.sums or self.summed)
            or self.scored
            or self.outer
        )


class _Functions(TorchFunctionMode):
    """Sees fused attention and projections by the function the model called."""

    def __init__(self, values: _Values) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if getattr(func, "__name__", "") in FUSED:
            return self.values.fused(func, args, kwargs)
        if name in PROJECTIONS or (
            name in {"matmul", "rmatmul", "mm", "addmm"} and _by_weight(args)
        ):
            with self.values.projecting():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _keys(func: Callable, args: tuple, kwargs: dict) -> int:
    """Number of keys of a fused call; 0 if it is hidden inside."""
    if "scaled_dot_product" not in func.__name__:
        return 0
    key = kwargs.get("key", args[1] if len(args) > 1 else None)
    return key.shape[-2] if isinstance(key, Tensor) else 0


def _by_weight(args: tuple) -> bool:
    """Whether the right factor of a product is a weight matrix."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    right = tensors[-1] if tensors else None
    while right is not None and not isinstance(right, nn.Parameter):
        right = right._base
    return right is not None and tensors[-1].dim() <= 2


class _Values(TorchDispatchMode):
    """Follows tensors through every operator of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.truth = Truth()
        self.places: list[Site | None] = []
        self.modules: list[str] = [""]
        self.inside = 0
        self.projection = 0

    # -- what the function mode and the hooks tell ------------------------------------------------

    def fused(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Count one fused operator and do not look inside."""
        if self.inside == 0:
            self.places.append(Site(self.modules[-1], "fused", (), _keys(func, args, kwargs)))
        self.inside += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.inside -= 1

    def projecting(self) -> _Projecting:
        """A context in which products are projections, not scores."""
        return _Projecting(self)

    # -- operators ---------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        if self.inside:
            return out
        if name.startswith(FUSED_KERNELS):
            self.places.append(Site(self.modules[-1], "fused", (), _keys(func, args, kwargs)))
            return out
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        known = {id(t): self.tags[t] for t in inputs if t in self.tags}
        with torch.no_grad():
            self._follow(name, func, args, kwargs, inputs, known, out)
        return out

    def _follow(
        self, name: str, func: Any, args: tuple, kwargs: dict, inputs: list, known: dict, out: Any
    ) -> None:
        if name in SOFTMAX | LOG_SOFTMAX:
            self._softmax(name, args, known, out)
        elif name in {"exp", "exp_", "exp2"}:
            self._exp(inputs[0], known, out)
        elif name == "logsumexp":
            self._logsumexp(args, known, out)
        elif name in CONTRACTION:
            self._contract(name, inputs, known, out)
        elif not known and name not in {"mul", "mul_"}:
            return
        elif name == "copy_":
            self._copy(args, known, out)
        elif name in MOVEMENT:
            self._move(func, args, kwargs, known, out)
        elif name in SUMS:
            self._sum(inputs[0], args, known, out)
        else:
            self._elementwise(name, inputs, known, out)

    def _new(self, tensor: Tensor, dim: int, scored: bool) -> tuple[_Softmax, Tensor]:
        place = len(self.places)
        self.places.append(None)
        softmax = _Softmax(tuple(tensor.shape), dim, scored, self.modules[-1], place)
        tracer = torch.empty_like(tensor, dtype=torch.int64)
        tracer.copy_(torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape))
        return softmax, tracer

    def _softmax(self, name: str, args: tuple, known: dict, out: Tensor) -> None:
        scores = args[0]
        self.truth.softmaxes += 1
        if scores.dim() == 0:
            return
        scored = known.get(id(scores), _Tags()).scored
        softmax, tracer = self._new(out, args[1] % scores.dim(), scored)
        slot = {softmax: tracer}
        self.tags[out] = _Tags(logs=slot) if name in LOG_SOFTMAX else _Tags(weights=slot)

    def _exp(self, scores: Tensor, known: dict, out: Tensor) -> None:
        tags = known.get(id(scores), _Tags())
        if tags.logs:
            self.tags[out] = _Tags(weights=dict(tags.logs), scored=tags.scored)
        elif tags.scored:
            softmax, tracer = self._new(out, -1, scored=True)
            self.tags[out] = _Tags(powers={softmax: tracer}, scored=True)

    def _logsumexp(self, args: tuple, known: dict, out: Tensor) -> None:
        scores, dims = args[0], args[1]
        tags = known.get(id(scores))
        if tags is None or not tags.scored or len(dims) != 1:
            return
        softmax, tracer = self._new(scores, dims[0] % scores.dim(), scored=True)
        tags.powers = {**tags.powers, softmax: tracer}
        self.tags[out] = _Tags(sums={softmax: softmax.dim})

    def _contract(self, name: str, inputs: list, known: dict, out: Tensor) -> None:
        factors = inputs[-2:]
        tags = _Tags(scored=not self.projection)
        axes = (factors[0].dim() - 1, max(0, factors[1].dim() - 2))
        for factor, axis, left in zip(factors, axes, (True, False), strict=True):
            mine = known.get(id(factor), _Tags())
            for softmax, tracer in mine.weights.items():
                if softmax.along(tracer, axis, softmax.dim):
                    self._found(softmax, "matmul")
                elif (kept := _kept(tracer, out, left)) is not None:
                    softmax.mixed = True
                    tags.weights[softmax] = kept
            for softmax, tracer in mine.powers.items():
                dims = range(len(softmax.shape)) if softmax.dim < 0 else (softmax.dim,)
                over = [d for d in dims if softmax.along(tracer, axis, d)]
                if over:
                    tags.summed[softmax] = over[0]
        self._put(out, tags)

    def _found(self, softmax: _Softmax, kind: str) -> None:
        if softmax.site is None and softmax.scored:
            softmax.site = Site(softmax.module, kind, softmax.shape, softmax.shape[softmax.dim])
            self.places[softmax.place] = softmax.site
            self.truth.mixed += softmax.mixed

    def _copy(self, args: tuple, known: dict, out: Tensor) -> None:
        target, source = args[0], args[1]
        tags = known.get(id(source))
        base = target._base if target._base is not None else target
        if tags is None:
            return
        whole = self.tags[base] if base in self.tags else _Tags()
        whole.scored |= tags.scored
        for softmax, tracer in tags.weights.items():
            into = whole.weights.get(softmax)
            if into is None:
                into = torch.empty_like(base, dtype=torch.int64).fill_(-1)
            part = (
                torch.as_strided(
                    into,
                    target.size(),
                    target.stride(),
                    target.storage_offset() - base.storage_offset(),
                )
                if into.stride() == base.stride()
                else None
            )
            if part is not None:
                part.copy_(tracer.expand(target.shape))
                whole.weights[softmax] = into
        self._put(base, whole)
        if target is not base:
            self._put(target, _Tags(weights=dict(tags.weights), scored=tags.scored))

    def _move(self, func: Any, args: tuple, kwargs: dict, known: dict, out: Any) -> None:
        outs = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        merged = [_Tags() for _ in outs]
        for tags in known.values():
            for mine in merged:
                mine.scored |= tags.scored
                mine.outer |= tags.outer
                mine.sums |= tags.sums
                mine.summed |= tags.summed
        for slot in ("weights", "powers", "logs"):
            for softmax in {s for tags in known.values() for s in getattr(tags, slot)}:
                moved = _moved(func, args, kwargs, known, slot, softmax)
                if len(moved) == len(outs):
                    for mine, tracer in zip(merged, moved, strict=True):
                        getattr(mine, slot)[softmax] = tracer
        for tensor, tags in zip(outs, merged, strict=True):
            self._put(tensor, tags)

    def _sum(self, tensor: Tensor, args: tuple, known: dict, out: Tensor) -> None:
        mine = known.get(id(tensor), _Tags())
        tags = _Tags(scored=mine.scored or mine.outer)
        dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        for axis in dims:
            for softmax, tracer in mine.weights.items():
                if mine.outer and softmax.along(tracer, axis, softmax.dim):
                    self._found(softmax, "product_sum")
            for softmax, tracer in mine.powers.items():
                over = [d for d in range(len(softmax.shape)) if softmax.along(tracer, axis, d)]
                if over:
                    (tags.summed if mine.outer else tags.sums)[softmax] = over[0]
        self._put(out, tags)

    def _elementwise(self, name: str, inputs: list, known: dict, out: Any) -> None:
        outs = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        first = outs[0] if outs else None
        if first is None:
            return
        tags = _Tags(
            scored=any(mine.scored for mine in known.values()),
            outer=any(mine.outer for mine in known.values()) or _outer(name, inputs, first),
        )
        for tensor in inputs:
            mine = known.get(id(tensor), _Tags())
            for slot in ("weights", "powers", "logs"):
                for softmax, tracer in getattr(mine, slot).items():
                    if _broadcasts(tracer.shape, first.shape):
                        getattr(tags, slot)[softmax] = tracer.expand(first.shape)
            tags.sums |= mine.sums
            tags.summed |= mine.summed
        self._normalise(name, inputs, known, tags)
        self._put(first, tags)

    def _normalise(self, name: str, inputs: list, known: dict, tags: _Tags) -> None:
        """Division by the sum of powers turns powers into weights and counts `powers @ values`."""
        for softmax, dim in list(tags.sums.items()):
            if softmax in tags.powers and name.startswith(("div", "mul", "sub")):
                tracer = tags.powers.pop(softmax)
                softmax.dim = dim
                (tags.logs if name.startswith("sub") else tags.weights)[softmax] = tracer
            if tags.summed.get(softmax) == dim and name.startswith(("div", "mul")):
                self._found(softmax, "matmul")

    def _put(self, tensor: Tensor, tags: _Tags) -> None:
        if tags.any():
            self.tags[tensor] = tags
        elif tensor in self.tags:
            del self.tags[tensor]


class _Projecting:
    """Marks the products inside as projections."""

    def __init__(self, values: _Values) -> None:
        self.values = values

    def __enter__(self) -> None:
        self.values.projection += 1

    def __exit__(self, *exc: object) -> None:
        self.values.projection -= 1


def _kept(tracer: Tensor, out: Tensor, left: bool) -> Tensor | None:
    """The tracer of a product whose summed axis is not the softmax's: its first slice."""
    if tracer.dim() < 2 or out.dim() != tracer.dim():
        return None
    kept = tracer[..., :1] if left else tracer[..., :1, :]
    return kept.expand(out.shape).contiguous() if _broadcasts(kept.shape, out.shape) else None


def _moved(
    func: Any, args: tuple, kwargs: dict, known: dict, slot: str, softmax: _Softmax
) -> list[Tensor]:
    """The same data movement, done to one softmax's tracer; [] where it cannot be done."""

    def tracer_of(tensor: Tensor) -> Tensor:
        mine = getattr(known.get(id(tensor), _Tags()), slot).get(softmax)
        if mine is not None:
            return mine
        return (
            torch.full_like(tensor, -1, dtype=torch.int64) if tensor.is_floating_point() else tensor
        )

    replaced, options = tree_map_only(Tensor, tracer_of, (args, kwargs))
    if func.__name__.startswith("constant_pad_nd"):
        replaced = (*replaced[:2], -1)
    options = {key: value for key, value in options.items() if key in {"dim", "memory_format"}}
    if func.__name__.startswith("_to_copy"):
        return [replaced[0].clone()]
    try:
        moved = func(*replaced, **options)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return []
    return [t for t in tree_iter(moved) if isinstance(t, Tensor)]


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)
    )


def _outer(name: str, inputs: list, out: Tensor) -> bool:
    """Whether a product broadcasts both of its factors."""
    tensors = [t for t in inputs if t.dim()]
    if not name.startswith("mul") or len(tensors) != 2:
        return False
    return all(_spread(t) < out.numel() for t in tensors)


def _spread(tensor: Tensor) -> int:
    """Elements of a tensor that are not repeats of each other by `expand`."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def observe(model: nn.Module | Callable, args: tuple, kwargs: dict) -> tuple[Any, Truth]:
    """Run a model in eager mode and count its attention sites.

    Args:
        model: A module or function; it is called once, without gradients.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        What the model returned, and the count.
    """
    values = _Values()
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            for name, module in model.named_modules():
                for handle in _name_hooks(module, name, values.modules):
                    stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Functions(values))
        with values:
            out = model(*args, **kwargs)
    found = [site for site in values.places if site is not None]
    values.truth.sites = [site for site in found if not site.single_key]
    values.truth.degenerate = len(found) - values.truth.count
    for leaf in tensors(out):
        if leaf in values.tags:
            weights = values.tags[leaf].weights
            values.truth.escaped += sum(softmax.site is not None for softmax in weights)
    return out, values.truth


def _name_hooks(module: nn.Module, name: str, stack: list[str]) -> list[Any]:
    def enter(*_: object) -> None:
        stack.append(name)

    def leave(*_: object) -> None:
        stack.pop()

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, in order."""
    for leaf in tree_flatten(_plain(value))[0]:
        if isinstance(leaf, Tensor):
            yield leaf


def _plain(value: Any) -> Any:
    """Mappings and dataclasses of outputs as plain containers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module)):
        return [_plain(item) for item in vars(value).values()]
    return value
