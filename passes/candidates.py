"""What detection hands to the proof: an attention as nodes of the shadow and layouts over axes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import sympy

from sparse_compile.ir import Reason
from sparse_compile.passes.axes import Axis, Layout, axes_of, resolve

if TYPE_CHECKING:
    from torch import fx

DROPPED = -1e4  # a fill at or below this leaves a key no weight, unless all keys have it

StepKind = Literal[
    "mul", "div", "add", "sub", "rsub", "fill", "where", "unary", "min", "max", "sink", "cast"
]


class NotASite(Exception):
    """A softmax that is no attention: it is left alone and not reported."""


class Declined(Exception):
    """An attention that cannot be replaced, with the reason."""

    def __init__(self, code: str, message: str) -> None:
        """Keep the coded reason."""
        super().__init__(message)
        self.reason = Reason(code=code, message=message)


@dataclass(frozen=True)
class Cut:
    """A range of positions: `part` runs over `whole` from `start`."""

    whole: tuple[Axis, ...]
    part: tuple[Axis, ...]
    start: int


@dataclass(frozen=True)
class Step:
    """One operator on the way from Q K^T to the softmax, or from the softmax to V.

    `term` is the other tensor (a bias, a mask, a factor) with its own layout; `value` a number.
    """

    kind: StepKind
    node: fx.Node
    term: fx.Node | None = None
    layout: Layout = ()
    value: sympy.Expr | None = None
    keep_if: bool = True  # fill/where: the truth value of `term` at which the score is kept
    name: str = ""  # unary: the function
    cuts: tuple[Cut, ...] = ()  # add: the term covers only this part of the scores


@dataclass(frozen=True)
class Tensor:
    """A node of the shadow with its layout."""

    node: fx.Node
    layout: Layout

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All its axes, in row-major order."""
        return axes_of(self.layout)


@dataclass(frozen=True)
class Candidate:
    """An attention read out of the shadow, nothing proven yet."""

    anchor: fx.Node
    q: Tensor
    k: Tensor
    v: Tensor
    summed: tuple[Axis, ...]  # the head dimension
    score: Layout  # layout of the softmax's input
    keys: tuple[Axis, ...]
    out: Tensor
    steps: tuple[Step, ...] = ()  # from Q K^T to the softmax
    post: tuple[Step, ...] = ()  # from the softmax to the product with V
    dropout_p: float = 0.0
    softmax_dtype: str = ""
    factor: sympy.Expr = field(default_factory=lambda: sympy.Integer(1))  # of SDPA itself
    region: frozenset[fx.Node] = frozenset()  # computed by the attention itself
    nan_to_zero: bool = False

    @property
    def is_fused(self) -> bool:
        """The model calls `scaled_dot_product_attention` itself."""
        return self.anchor is self.out.node

    def score_sizes(self) -> tuple[sympy.Expr, ...]:
        """The sizes of the score tensor."""
        return tuple(axis.size for axis in axes_of(self.score))

    @property
    def key_axes(self) -> tuple[Axis, ...]:
        """The softmax axis, splits applied."""
        return resolve(self.keys)
