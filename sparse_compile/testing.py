"""Oracles, generators and asserts that the tests of kernels and passes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from sparse_compile.inspect.report import SiteReport
    from sparse_compile.passes.shadow import Shadow

Layout = Literal["contiguous", "token_major", "padded"]
T = TypeVar("T")
# of tanh.approx.f32, which bfloat16 gets; eager rounds its scores by four times as much
TANH_STEP = 2.0**-11


def in_dtype(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Detached copies of tensors, the floating ones in `dtype`, that require grad as before."""
    return [
        tensor.detach()
        .to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        .requires_grad_(tensor.requires_grad)
        for tensor in tensors
    ]


def assert_close_derived(
    actual: Tensor, truth: Tensor, natural: Tensor | Sequence[Tensor], *, name: str = "the result"
) -> None:
    """Assert that a kernel errs at most twice as much as the reference does by rounding.

    Args:
        actual: What the kernel gave.
        truth: The reference's result for float64 inputs.
        natural: The reference's result in the working dtype, or several that differ in the order of
            their sums. The largest distance of an element from `truth` is the natural error. For a
            kernel in float64, the reference's results in float32: the error is scaled by the
            dtypes' steps, and granted to `truth` as well.
        name: What is compared, for the message.

    Raises:
        AssertionError: Shapes differ, an element is too far off, or infinities and NaN are not
            where `truth` has them.
    """
    assert actual.shape == truth.shape, f"{name} has shape {actual.shape}, not {truth.shape}"
    found, wanted = actual.detach().double(), truth.detach().double()
    finite = wanted.isfinite()
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    step = torch.finfo(actual.dtype).eps
    roughs = [natural] if isinstance(natural, Tensor) else natural
    errors = [(rough.detach().double() - wanted)[finite].abs() for rough in roughs]
    largest = max((error.max().item() for error in errors if error.numel()), default=0.0)
    allowed = 2 * largest
    if actual.dtype == torch.float64:
        # a register holds half as many float64, so sums have half as many partial sums
        largest *= 2 * step / torch.finfo(torch.float32).eps
        allowed = 3 * largest
    # rounding the result errs by half a step at most; 2e-45 is that of subnormal floats
    limit = allowed + step / 2 * wanted.abs() + 2e-45
    wrong = ~torch.where(finite, (found - wanted).abs() <= limit, same)
    if wrong.any():
        worst = (found - wanted).abs().nan_to_num(torch.inf).masked_fill(~wrong, -1.0).argmax()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off by more than "
            f"{allowed:.3g} (natural error {largest:.3g}) and one rounding; worst "
            f"{found.flatten()[worst].item():.9g}, truth {wanted.flatten()[worst].item():.9g} at "
            f"flat index {int(worst)}"
        )


def random_heads(
    batch: int,
    heads: int,
    tokens: int,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "contiguous",
    requires_grad: bool = False,
) -> Tensor:
    """Normal random queries, keys or values [B, H, T, D] in one of the layouts that models make.

    `token_major` is a transposed view of [B, T, H, D]; `padded` is a view into a larger tensor
    that holds NaN around it.
    """
    if layout == "token_major":
        value = torch.randn(batch, tokens, heads, size, dtype=dtype).transpose(1, 2)
    elif layout == "padded":
        room = torch.full((batch, heads + 1, tokens + 3, size + 5), float("nan"), dtype=dtype)
        value = room[:, 1:, 2:-1, 3:-2]
        value.copy_(torch.randn(batch, heads, tokens, size, dtype=dtype))
    else:
        value = torch.randn(batch, heads, tokens, size, dtype=dtype)
    return value.requires_grad_(requires_grad)


def in_backend(
    use: Callable[[fx.GraphModule, Sequence[Any]], T],
    function: Callable[..., Any],
    *args: Any,
    **options: Any,
) -> T:
    """What `use` makes of the one graph that Dynamo traces, while Dynamo waits for its backend."""
    seen: list[T] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(use(gm, inputs))
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True, **options)(*args)
    (found,) = seen
    return found


def shadow_of(function: Callable[..., Any], *args: Any, **options: Any) -> Shadow:
    """The shadow of the one graph that Dynamo makes of a function."""
    from sparse_compile.passes.shadow import build_shadow

    return in_backend(build_shadow, function, *args, **options)


def rewritten_alike(
    function: Callable[..., Any], *args: Any, tolerance: float = 1e-12, **options: Any
) -> tuple[SiteReport, ...]:
    """Rewrite a function's graph, assert that it computes what it did before, and report its sites.

    Gradients are compared too where an argument requires them.

    Args:
        function: Takes `args`, gives one tensor; it may write into its arguments.
        args: Its inputs; of float64, so that the default tolerance holds.
        tolerance: Absolute and relative. 1e-12 is 4500 steps of float64: sums of some hundred
            products of order one stay far below it, and no wrong formula does.
        options: Of `torch.compile`.
    """
    from sparse_compile import backend

    own, ours = _copies(args), _copies(args)
    wanted = function(*own)
    rewritten = torch.compile(
        function, backend=backend.rewrite_only, options={"verify": True}, **options
    )
    found = rewritten(*ours)
    report = backend.last_report()
    assert not report.errors, report.errors[0]
    assert not report.failed_validations, report.failed_validations
    broken = [site.reason for site in report.sites if site.reason_code == "internal-error"]
    assert not broken, broken[0]

    def assert_same(a: Any, b: Any) -> None:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)

    assert_same(found, wanted)
    assert_same([a for a in ours if _is_float(a)], [a for a in own if _is_float(a)])
    if wanted.requires_grad:
        weight = torch.randn_like(wanted)
        (wanted * weight).sum().backward()
        (found * weight).sum().backward()
        grads = [
            [arg.grad for arg in side if _is_float(arg) and arg.requires_grad]
            for side in (ours, own)
        ]
        assert_same(*grads)
    return report.sites


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _copies(args: Sequence[Any]) -> list[Any]:
    return [
        arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg
        for arg in args
    ]
