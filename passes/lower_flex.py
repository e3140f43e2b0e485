"""Computes a score program by PyTorch's `flex_attention`, written into a Dynamo graph.

The block mask is computed in the graph from the bounds of the predicate over blocks, so nothing of
size [T, S] exists. The layout of its tuple is asked of `BlockMask` itself; besides, torch 2.11 and
2.13 agree in everything used here (both return the log-sum-exp in base 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

import sparse_compile.kernels.block_lists  # noqa: F401  registers the operator
from sparse_compile.evaluation import Source, evaluate, fits, slice_of
from sparse_compile.expressions import INDICES, Load, b, s, t, x
from sparse_compile.intervals import bounds, load_extrema

if TYPE_CHECKING:
    from sparse_compile.ir import ScoreProgram

BLOCK = 128
_WHOLE = 1 << 30  # the block size by which flex_attention knows that there is no block mask


def flex_supported(
    device_type: str, training: bool, head_dim: int, value_dim: int, dtype: torch.dtype
) -> str | None:
    """Why `flex_attention` should not compute such an attention; None if it can."""
    if device_type == "cpu":
        if training:
            return "flex_attention has no backward on the CPU"
        # NotImplementedError("Unsupported for `epilogue_nodes` in CppFlexAttentionTemplate")
        return "flex_attention on the CPU does not compile where elementwise operations follow it"
    if device_type != "cuda":
        return f"flex_attention is not used on {device_type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"flex_attention has no kernel for {dtype}"
    if min(head_dim, value_dim) < 16:
        return f"flex_attention needs head sizes of 16 or more, not {min(head_dim, value_dim)}"
    if max(head_dim, value_dim) > 256:
        return f"flex_attention runs out of shared memory at head size {max(head_dim, value_dim)}"
    return None


def emit_flex(
    gm: fx.GraphModule,
    before: fx.Node,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    operands: Sequence[fx.Node],
    program: ScoreProgram,
    sizes: Mapping[sympy.Symbol, int | fx.Node],
    *,
    may_be_empty: bool,
    shared: dict[Any, tuple[fx.Node, ...]] | None = None,
) -> fx.Node:
    """Inserts the nodes that compute `program` over q, k and v.

    Args:
        gm: A Dynamo graph with `example_value`s.
        before: The new nodes go in front of it.
        q: [B, Hq, T, D].
        k: [B, Hkv, S, D].
        v: [B, Hkv, S, Dv].
        operands: What the program's loads read.
        program: It must have no `weight`.
        sizes: Values of the size symbols in the program's formulas.
        may_be_empty: A row may keep no key, so that `empty_rows` matters.
        shared: Block masks already in the graph, to be used again by sites behind them; updated.

    Returns:
        The node of the output, [B, Hq, T, Dv].

    Raises:
        NotImplementedError: `program` has a weight; or on the CPU: a sink, rows without keys that
            do not give zeros, or a read of a tensor with symbolic sizes.
    """
    if program.weight is not None:
        raise NotImplementedError("flex_attention has no factor after the softmax")
    with gm.graph.inserting_before(before):
        site = _Site(gm, (q, k, v), operands, program, sizes)
        return site.emit(may_be_empty, {} if shared is None else shared).node


class _Recorder(fx.proxy.GraphAppendingTracer):
    """Appends nodes to a graph and gives each its `example_value`."""

    def __init__(self, gm: fx.GraphModule, fake_mode: Any) -> None:
        super().__init__(gm.graph)
        self.gm, self.fake_mode = gm, fake_mode

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest)
        if kind == "get_attr":
            return node
        values = fx.map_arg((node.args, node.kwargs), self._example)
        # flex_attention's own autograd would trace under the wrong fake mode
        with self.fake_mode, torch.no_grad():
            if kind == "call_method":
                (first, *others), named = values
                node.meta["example_value"] = getattr(first, target)(*others, **named)
            else:
                node.meta["example_value"] = target(*values[0], **values[1])
        return node

    def _example(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.gm.get_submodule(node.target)
        return node.meta["example_value"]


class _Buffers:
    """The tensors that one modification captures, and its formula in terms of them."""

    def __init__(self, site: _Site, formula: sympy.Basic, *, differentiable: bool) -> None:
        self.site, self.differentiable = site, differentiable
        self.proxies: list[fx.Proxy] = []
        self.known: dict[Any, int] = {}
        self.lengths: dict[tuple[int, int], int] = {}  # (buffer, axis) to the buffer of its size
        self.formula = formula.replace(Load, self._read)
        self.sizes = {
            symbol: self._add(symbol, lambda symbol=symbol: site.size_tensor(site.sizes[symbol]))
            for symbol in sorted(formula.free_symbols & set(site.sizes), key=str)
        }

    def captured(self, graph: fx.Graph, tracer: fx.proxy.TracerBase) -> list[Source]:
        """A placeholder for each tensor."""
        values = [
            fx.Proxy(graph.placeholder(f"captured_{number}"), tracer)
            for number in range(len(self.proxies))
        ]
        sources = []
        for number, value in enumerate(values):
            example = _example(self.proxies[number])
            if self.site.is_limited and not all(isinstance(n, int) for n in example.shape):
                raise NotImplementedError(
                    "Inductor's flex_attention for the CPU names the symbolic sizes of captured "
                    "tensors wrongly, so that its C++ code does not compile (torch 2.13)"
                )
            shape = [
                values[self.lengths[number, axis]] if (number, axis) in self.lengths else size
                for axis, size in enumerate(example.shape)
            ]
            sources.append(Source(value, example.dtype, tuple(shape)))
        return sources

    def _add(self, key: Any, make: Callable[[], fx.Proxy]) -> int:
        if key not in self.known:
            self.proxies.append(make())
            self.known[key] = len(self.proxies) - 1
        return self.known[key]

    def _read(self, number: sympy.Integer, *positions: sympy.Expr) -> sympy.Expr:
        """The same read of a captured tensor.

        A modification must index with tensors only, and each read that has a gradient needs a
        tensor of its own: both are limits of flex_attention.
        """
        has_grad = self.differentiable and self.site.needs_grad[int(number)]
        constant = tuple(int(p) if p.is_Integer else None for p in positions)
        key = (int(number), constant, positions if has_grad else None)
        captured = self._add(key, lambda: self._taken(int(number), constant, has_grad))
        remaining = [p for p in positions if not p.is_Integer]
        if has_grad and not remaining:
            remaining = [sympy.Mul(0, b, evaluate=False)]
        shape = _example(self.proxies[captured]).shape
        for axis, (position, size) in enumerate(zip(remaining, shape, strict=True)):
            is_inside = position in INDICES and fits(self.site.lengths[position], size)
            if not is_inside and not isinstance(size, int):
                length = self.proxies[captured].size(axis)
                self.lengths[captured, axis] = self._add(
                    (captured, axis), lambda length=length: self.site.size_tensor(length)
                )
        return Load(captured, *remaining)

    def _taken(self, number: int, constant: tuple[int | None, ...], has_grad: bool) -> fx.Proxy:
        """The part of an operand at the positions that are constant."""
        part = self.site.operands[number]
        is_first = not any(len(key) == 3 and key[0] == number for key in self.known)
        for axis in reversed(range(len(constant))):
            if constant[axis] is not None:
                part = part.select(axis, constant[axis])
        if not has_grad:
            return part.detach() if self.site.needs_grad[number] else part
        # PyTorch adds up gradients in the dtype of what it captured
        part = part.to(torch.float32, copy=not is_first)
        return part.reshape(1) if None not in constant else part


class _Site:
    """One call of `emit_flex`."""

    def __init__(
        self,
        gm: fx.GraphModule,
        qkv: tuple[fx.Node, fx.Node, fx.Node],
        operands: Sequence[fx.Node],
        program: ScoreProgram,
        sizes: Mapping[sympy.Symbol, int | fx.Node],
    ) -> None:
        example = qkv[0].meta["example_value"]
        self.gm, self.program, self.device = gm, program, example.device
        self.is_limited = _has_cpu_template(example.device)
        self.recorder = _Recorder(gm, example.fake_mode)
        self.q, self.k, self.v = (self.proxy(node) for node in qkv)
        self.nodes = tuple(operands)
        self.operands = [self.proxy(node) for node in operands]
        self.needs_grad = [_example(operand).requires_grad for operand in self.operands]
        self.sources = [
            Source(p, _example(p).dtype, tuple(_example(p).shape)) for p in self.operands
        ]
        self.sizes = {
            symbol: self.proxy(size) if isinstance(size, fx.Node) else size
            for symbol, size in sizes.items()
        }
        k_example = qkv[1].meta["example_value"]
        self.lengths = dict(zip(INDICES, (*example.shape[:3], k_example.shape[2]), strict=True))
        self.counts: dict[sympy.Symbol, Any] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value of the graph that operators and torch functions can be applied to."""
        return fx.Proxy(node, self.recorder)

    def make(self, factory: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> fx.Proxy:
        """A new tensor on the site's device."""
        kwargs = {**kwargs, "device": self.device}
        return self.recorder.create_proxy("call_function", factory, args, kwargs)

    def arange(self, length: Any) -> fx.Proxy:
        """The numbers up to a length."""
        return self.make(torch.arange, length)

    def count(self, index: sympy.Symbol) -> Any:
        """How many values an index has: a number, or the proxy of a symbolic size."""
        if index not in self.counts:
            tensor, axis = (self.k, 2) if index == s else (self.q, INDICES.index(index))
            size = self.lengths[index]
            self.counts[index] = size if isinstance(size, int) else tensor.size(axis)
        return self.counts[index]

    def size_tensor(self, size: Any) -> fx.Proxy:
        """A size as a tensor of no dimensions."""
        return self.make(torch.full, (), size, dtype=torch.int64)

    def emit(self, may_be_empty: bool, shared: dict[Any, tuple[fx.Node, ...]]) -> fx.Proxy:
        """The output, and everything before it."""
        program = self.program
        score, score_buffers = self._score_mod()
        mask, mask_buffers = self._mask_mod()
        results = self.recorder.create_proxy(
            "call_function",
            torch.ops.higher_order.flex_attention,
            (
                self.q,
                self.k,
                self.v,
                score,
                self._block_mask(mask, shared),
                float(program.scale),
                _kernel_options(not self.is_limited),
                score_buffers,
                mask_buffers,
            ),
            {},
        )
        out = results[0]
        if program.sink is None and (not may_be_empty or program.empty_rows == "zero"):
            return out
        if self.is_limited:
            raise NotImplementedError("flex_attention returns no log-sum-exp on the CPU")
        lse = results[1] * math.log(2.0)
        if program.sink is not None:
            share = torch.sigmoid(lse - self._sink()).unsqueeze(-1)
            return (out * share).to(_example(out).dtype)
        is_empty = (lse == -math.inf).unsqueeze(-1)
        return torch.where(is_empty, self._empty_value(), out)

    def _score_mod(self) -> tuple[fx.Proxy, tuple[fx.Proxy, ...]]:
        buffers = _Buffers(self, self.program.score, differentiable=True)
        return self._modification("score_mod", [x, *INDICES], buffers)

    def _mask_mod(self) -> tuple[fx.Proxy, tuple[fx.Proxy, ...]]:
        buffers = _Buffers(self, self.program.keep, differentiable=False)
        return self._modification("mask_mod", list(INDICES), buffers)

    def _modification(
        self, kind: str, symbols: list[sympy.Symbol], buffers: _Buffers
    ) -> tuple[fx.Proxy, tuple[fx.Proxy, ...]]:
        """A formula of single elements as a submodule, and what it captures."""
        graph = fx.Graph()
        tracer = fx.proxy.GraphAppendingTracer(graph)
        inputs = {one: fx.Proxy(graph.placeholder(str(one)), tracer) for one in symbols}
        captured = buffers.captured(graph, tracer)
        env: dict[sympy.Basic, Any] = dict(inputs)
        env.update((symbol, captured[number]) for symbol, number in buffers.sizes.items())
        if buffers.formula != x and x in inputs:
            env[x] = inputs[x].to(torch.float32)
        result = evaluate(buffers.formula, env, captured, lengths=self.lengths)
        if not isinstance(result, fx.Proxy):
            dtype = torch.bool if kind == "mask_mod" else torch.float32
            result = torch.full_like(inputs[b], result, dtype=dtype)
        graph.output(result.node)
        name, number = f"sparse_compile_{kind}_0", 0
        while hasattr(self.gm, name):
            number += 1
            name = f"sparse_compile_{kind}_{number}"
        self.gm.add_submodule(name, fx.GraphModule({}, graph))
        return self.recorder.create_proxy("get_attr", name, (), {}), tuple(buffers.proxies)

    def _block_mask(
        self, mask: fx.Proxy, shared: dict[Any, tuple[fx.Node, ...]]
    ) -> tuple[Any, ...]:
        """The tuple that flex_attention takes, with `mask` as its function."""
        if self.program.keep is sympy.true:
            return _block_mask_tuple(self._no_blocks(), (1, 1), _WHOLE, mask)
        sizes = tuple((symbol, str(value)) for symbol, value in sorted(self.sizes.items(), key=str))
        lengths = tuple(str(_example(p).shape) for p in (self.q, self.k))
        key = (self.program.keep, self.nodes, sizes, lengths)
        if key not in shared:
            shared[key] = tuple(proxy.node for proxy in self._blocks())
        blocks = [self.proxy(node) for node in shared[key]]
        return _block_mask_tuple(blocks, (self.count(t), self.count(s)), BLOCK, mask)

    def _no_blocks(self) -> list[Any]:
        """One partial block that holds everything, as flex_attention makes it for no mask."""
        number = self.make(torch.ones, (1, 1, 1), dtype=torch.int32)
        index = self.make(torch.zeros, (1, 1, 1, 1), dtype=torch.int32)
        return [number, index, None, None, number, index, None, None]

    def _blocks(self) -> list[fx.Proxy]:
        """Counts and lists of partial and full blocks, by rows and then by columns."""
        keep = self.program.keep
        intervals: dict[sympy.Basic, tuple[Any, Any]] = {}
        blocks: dict[sympy.Symbol, tuple[Any, int, Any]] = {}
        inside = begun = None
        for axis, symbol in enumerate(INDICES):
            length, size = self.count(symbol), BLOCK if symbol in (t, s) else 1
            shape = [-1 if i == axis else 1 for i in range(4)]
            count = (length + size - 1) // size
            if size > 1 and not isinstance(length, int):
                count = count + 1  # an empty block: a count that may be 1 would be compiled anew
            blocks[symbol] = (length, size, count)
            if size > 1:
                low = (self.arange(count) * size).view(shape)
                intervals[symbol] = (low, torch.clamp(low + (size - 1), max=length - 1))
                whole, starts = low + size <= length, low < length
                inside = whole if inside is None else inside & whole
                begun = starts if begun is None else begun & starts
            elif symbol in keep.free_symbols:
                intervals[symbol] = (self.arange(count).view(shape),) * 2
        for symbol in self.sizes:
            if symbol in keep.free_symbols:
                intervals[symbol] = (self.size_tensor(self.sizes[symbol]),) * 2
        for load in sorted(keep.atoms(Load), key=sympy.default_sort_key):
            source = self.sources[int(load.args[0])]
            extrema = load_extrema(source, load, blocks, self.lengths, self.arange)
            if extrema is not None:
                intervals[load] = extrema
        some, every = bounds(keep, intervals)
        # a bound may be constant, or miss an axis
        every = inside & every
        some = begun & some
        lists = torch.ops.sparse_compile.block_lists_v1.default(some & ~every, every)
        return [lists[number] for number in range(8)]

    def _sink(self) -> Any:
        """The sink's logit, broadcastable to [B, Hq, T]."""
        formula, symbols = self.program.sink, INDICES[:3]
        env: dict[sympy.Basic, Any] = {}
        for axis, symbol in enumerate(symbols):
            if symbol in formula.free_symbols:
                shape = [-1 if i == axis else 1 for i in range(3)]
                env[symbol] = self.arange(self.count(symbol)).view(shape)
        for symbol in self.sizes:
            if symbol in formula.free_symbols:
                env[symbol] = Source(self.size_tensor(self.sizes[symbol]), torch.int64, ())
        for load in sorted(formula.atoms(Load), key=sympy.default_sort_key):
            source = self.sources[int(load.args[0])]
            ranges = {symbol: (0, self.count(symbol)) for symbol in symbols}
            part = slice_of(source, load, ranges, self.lengths)
            if part is not None:
                env[load] = source._replace(value=part)
        return evaluate(formula, env, self.sources, lengths=self.lengths)

    def _empty_value(self) -> Any:
        if self.program.empty_rows == "nan":
            return math.nan
        group = _example(self.q).shape[1] // _example(self.k).shape[1]
        return self.v.mean(2, keepdim=True).repeat_interleave(group, 1)


def _has_cpu_template(device: torch.device) -> bool:
    """Whether Inductor lowers to its C++ template, which returns no log-sum-exp."""
    return device.type == "cpu"


class _Slot:
    """Stands for a tensor of a `BlockMask`, to see where its tuple holds it."""

    def dim(self) -> int:
        return 4


def _block_mask_tuple(
    values: Sequence[Any], lengths: tuple[Any, Any], size: int, mask: Any
) -> tuple[Any, ...]:
    from torch.nn.attention.flex_attention import BlockMask

    names = [
        f"{prefix}{axis}_{kind}"
        for axis in ("kv", "q")
        for prefix in ("", "full_")
        for kind in ("num_blocks", "indices")
    ]
    slots = {name: _Slot() for name in names}
    given = {
        name: None if value is None else slots[name]
        for name, value in zip(names, values, strict=True)
    }
    layout = BlockMask(seq_lengths=lengths, **given, BLOCK_SIZE=(size, size), mask_mod=mask)
    back = {id(slots[name]): value for name, value in zip(names, values, strict=True)}
    return tuple(back.get(id(item), item) for item in layout.as_tuple())


def _kernel_options(has_stats: bool) -> dict[str, Any]:
    """What `flex_attention` itself passes on when the user gives no options."""
    return {
        "BACKEND": "TRITON",  # short queries too: the decoding kernel refuses some shapes
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": has_stats,
        "OUTPUT_MAX": False,
    }


def _example(value: fx.Proxy) -> Any:
    return value.node.meta["example_value"]
