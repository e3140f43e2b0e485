"""Every private PyTorch import of the project, in one place (torch 2.11 to today's)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode

if TYPE_CHECKING:
    import sympy

RestartAnalysis = TensorifyScalarRestartAnalysis  # what Dynamo lets a backend raise, to trace again


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode | None:
    """The fake tensor mode that made the first fake tensor of `values`, if any."""
    for value in values:
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode
    return None


def new_fake_mode() -> FakeTensorMode:
    """A fake tensor mode with its own shape environment."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def trace_pre_dispatch(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """Trace to ATen before autograd and autocast, composite operators kept whole."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, pre_dispatch=True, tracing_mode="real")(*inputs)


def current_tracer() -> Any:
    """The tracer of the `make_fx` trace that is running."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    if mode is None:
        from torch._ops import _get_dispatch_mode_pre_dispatch

        mode = _get_dispatch_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY)
    assert mode is not None, "no make_fx trace is running"
    return mode.tracer


def traced_node(value: Any, tracer: Any) -> fx.Node | None:
    """The node that stands for a tensor or symbolic number in a running trace."""
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    if isinstance(value, torch.Tensor):
        found = get_proxy_slot(value, tracer, None)
        return None if found is None else found.proxy.node
    found = get_proxy_slot(value, tracer, None)
    return None if found is None else found.force().node


def track(value: Any, proxy: fx.Proxy, tracer: Any) -> None:
    """Make `proxy` stand for the tensors in `value` in a running trace."""
    from torch.fx.experimental.proxy_tensor import track_tensor_tree

    track_tensor_tree(value, proxy, constant=None, tracer=tracer)


def track_one(value: torch.Tensor, proxy: fx.Proxy, tracer: Any) -> None:
    """Make `proxy` stand for one tensor whose metadata will not change; cheaper than `track`."""
    from torch.fx.experimental.proxy_tensor import track_tensor

    track_tensor(value, proxy, constant=None, tracer=tracer)
    proxy.node.meta["val"] = value


def no_torch_functions() -> Any:
    """Inside, no torch function mode sees what is asked of tensors."""
    return torch._C.DisableTorchFunction()


def is_autocast_on() -> bool:
    """Whether operators that run now are cast."""
    return torch._C._is_any_autocast_enabled()


@contextmanager
def paused_trace() -> Iterator[None]:
    """What runs inside is not recorded by a running `make_fx` trace."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing():
        yield


@contextmanager
def unset_fake() -> Iterator[None]:
    """Tensors made inside are real, also under a fake tensor mode."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


@contextmanager
def preserved_modes() -> Iterator[None]:
    """Restore grad and autocast state: a graph that is interpreted half way may leave them set."""
    grad = torch.is_grad_enabled()
    devices = ("cpu", "cuda")
    casts = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for device, enabled, dtype in casts:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def size_hint(size: Any) -> int | None:
    """An example of a size, without a guard on it; None if nobody knows one."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    has_hint = getattr(node, "has_hint", None)
    return int(node.hint) if node is not None and has_hint is not None and has_hint() else None


def symbolic_size(size: sympy.Expr, example: torch.Tensor) -> int | torch.SymInt:
    """A size of a trace as PyTorch has it; comparing a symbolic one adds a guard.

    Args:
        size: Its expression.
        example: A fake tensor of the trace.
    """
    if size.is_Integer:
        return int(size)
    return example.fake_mode.shape_env.create_symintnode(size, hint=None)  # type: ignore[attr-defined]


def is_module_state(node: fx.Node) -> bool:
    """Whether a placeholder of a Dynamo graph is a buffer or tensor attribute of a module."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    owner = type(getattr(source, "base", None)).__name__
    return owner in ("UnspecializedParamBufferSource", "UnspecializedNNModuleSource")


def is_higher_order(target: Any) -> bool:
    """Whether an FX target is a higher-order operator (checkpoint, cond, flex_attention, ...)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """Hand a Dynamo graph to Inductor with configuration patches."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs), config_patches=dict(patches) or None)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for a `torch.compile` mode.

    Raises:
        RuntimeError: PyTorch knows no such mode.
    """
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode)) if mode and mode != "default" else {}


def inductor_options() -> dict[str, type | None]:
    """Every option of Inductor with its type; None where the type cannot be checked."""
    from torch._inductor import config

    names = config.get_config_copy()
    kinds = {name: config.get_type(name) for name in names}
    return {name: kind if isinstance(kind, type) else None for name, kind in kinds.items()}


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would call for the CPU; None if there is none."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return None


def backend_names() -> list[str]:
    """Every backend name that `torch.compile` knows, those of entry points included."""
    import torch._dynamo

    return torch._dynamo.list_backends()


def load_backend(name: str) -> Callable[..., Any]:
    """Import the backend that a name stands for, as `torch.compile` does."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


def unwrapped(error: Exception) -> Exception:
    """The same error in a form that Dynamo passes on to the user as it is."""
    from torch._dynamo.exc import ShortenTraceback

    kind = type(error)

    class Passed(kind, ShortenTraceback):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, first_useful_frame: Any = None) -> None:
            Exception.__init__(self, *args)
            self.first_useful_frame = first_useful_frame

    Passed.__name__, Passed.__qualname__, Passed.__module__ = (
        kind.__name__, kind.__qualname__, kind.__module__,
    )  # fmt: skip
    return Passed(*error.args)
