"""What the passes hand to each other: values only, no tensors, modules or live nodes.

Every class prints as one line and converts to plain JSON types in both directions
(`to_builtins`, `from_builtins`).
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec
import sympy

from sparse_compile import expressions
from sparse_compile.expressions import Load, Truth, Where

IR_VERSION = 1

KvSource = Literal["contiguous", "static_cache", "paged"]
EmptyRows = Literal["zero", "uniform", "nan"]
AtomKind = Literal[
    "causal",
    "window",
    "symmetric_window",
    "chunk",
    "prefix",
    "block_diagonal",
    "dilated",
    "key_padding",
    "query_padding",
    "document",
    "kv_length",
    "structural",
    "data",
]


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why a site was left as it was."""

    code: str  # stable, e.g. "weights-escape"
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class Operand(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that a formula loads from; `Load(i, ...)` names it by position."""

    name: str  # of the value in the model's graph
    shape: tuple[str, ...]
    dtype: str


class MaskAtom(msgspec.Struct, frozen=True, kw_only=True):
    """One conjunct of a mask predicate."""

    kind: AtomKind
    predicate: sympy.Basic  # Boolean over b, h, t, s and loads; true: the key is read
    text: str  # readable, e.g. "window(left=512)"

    def __str__(self) -> str:
        return self.text


class MaskProof(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the whole mask of a site: a conjunction of atoms."""

    atoms: tuple[MaskAtom, ...] = ()
    opaque: bool = False  # a part of the mask stays a tensor that is added to the scores

    @property
    def predicate(self) -> sympy.Basic:
        """The conjunction of the atoms; true for no atoms."""
        return sympy.And(*(atom.predicate for atom in self.atoms))

    @property
    def is_dense(self) -> bool:
        """Every key is read by every query."""
        return not self.atoms and not self.opaque

    def __str__(self) -> str:
        parts = [str(atom) for atom in self.atoms] + (["tensor"] if self.opaque else [])
        return " & ".join(parts) or "dense"


class Scale(msgspec.Struct, frozen=True, kw_only=True, tag="scale"):
    """x -> x * factor."""

    factor: sympy.Basic

    def __str__(self) -> str:
        return f"scale({number_text(self.factor)})"


class SoftCap(msgspec.Struct, frozen=True, kw_only=True, tag="soft_cap"):
    """x -> cap * tanh(x / cap)."""

    cap: sympy.Basic

    def __str__(self) -> str:
        return f"soft_cap({number_text(self.cap)})"


class Bias(msgspec.Struct, frozen=True, kw_only=True, tag="bias"):
    """x -> x + value; a formula, or `Load` of a tensor."""

    value: sympy.Basic
    text: str = ""  # e.g. "alibi"

    def __str__(self) -> str:
        return f"bias({self.text or self.value})"


class Masked(msgspec.Struct, frozen=True, kw_only=True, tag="mask"):
    """x -> x where `keep` holds, else -inf; the place of the mask in the order of transforms."""

    keep: sympy.Basic
    fill: float  # what the model wrote there: -inf or a large negative number

    def __str__(self) -> str:
        return "mask"


class Elementwise(msgspec.Struct, frozen=True, kw_only=True, tag="elementwise"):
    """x -> value, any other function of x and the indices."""

    value: sympy.Basic

    def __str__(self) -> str:
        return f"map({self.value})"


class Sink(msgspec.Struct, frozen=True, kw_only=True, tag="sink"):
    """One more logit in the softmax's denominator, with no value of its own."""

    logit: sympy.Basic

    def __str__(self) -> str:
        return f"sink({self.logit})"


class Dropout(msgspec.Struct, frozen=True, kw_only=True, tag="dropout"):
    """Dropout of the attention weights, in training."""

    p: float

    def __str__(self) -> str:
        return f"dropout({self.p:g})"


class WeightFactor(msgspec.Struct, frozen=True, kw_only=True, tag="weight"):
    """Attention weights are multiplied by a factor after the softmax."""

    factor: sympy.Basic

    def __str__(self) -> str:
        return f"weight({self.factor})"


ScoreTransform = Scale | SoftCap | Bias | Masked | Elementwise | Sink | Dropout | WeightFactor


class ScoreProgram(msgspec.Struct, frozen=True, kw_only=True):
    """What a kernel computes between Q K^T and the product with V.

    With `x = scale * (q . k)`: logit = score(x) where keep, else -inf; weights = softmax over s of
    the logits, with `sink` as one more logit in the denominator; then weights * weight.
    A row that keeps no key gives zeros, the mean of all V rows ("uniform": what a finite fill
    value gives) or NaN (what -inf gives), by `empty_rows`; `sink` makes it zero in any case.
    """

    scale: float = 1.0
    score: sympy.Basic = expressions.x
    keep: sympy.Basic = sympy.true
    empty_rows: EmptyRows = "zero"
    sink: sympy.Basic | None = None
    weight: sympy.Basic | None = None

    def encode(self) -> str:
        """One string, for an operator's schema; `decode` reads it back."""
        return msgspec.json.encode(to_builtins(self)).decode()

    @staticmethod
    def decode(text: str) -> ScoreProgram:
        """The inverse of `encode`."""
        return from_builtins(msgspec.json.decode(text), ScoreProgram)


class UnreadSite(msgspec.Struct, frozen=True, kw_only=True):
    """A softmax that looked like attention; nothing is proven about what it computes."""

    name: str  # module path, made unique in its graph
    anchor: str  # the operator that gave it away, e.g. "aten.softmax.int"
    source: str  # file:line of the model's code
    reason: Reason | None = None  # set: declined

    def __str__(self) -> str:
        return f"{self.name}: {f'declined, {self.reason}' if self.reason else 'not yet read'}"


class AttentionSite(msgspec.Struct, frozen=True, kw_only=True):
    """One attention found in a graph; knows nothing about how it will run."""

    name: str  # module path, made unique in its graph
    anchor: str  # the operator that gave it away, e.g. "aten.softmax.int"
    source: str  # file:line of the model's code
    batch: sympy.Basic
    query_heads: sympy.Basic
    kv_heads: sympy.Basic
    query_tokens: sympy.Basic
    key_tokens: sympy.Basic
    head_dim: sympy.Basic
    value_dim: sympy.Basic
    dtype: str
    scale: float  # constant factors on Q, K and the raw scores, multiplied out
    transforms: tuple[ScoreTransform, ...] = ()  # in the order they are applied
    mask: MaskProof = MaskProof()
    empty_rows: EmptyRows = "zero"
    operands: tuple[Operand, ...] = ()
    q_map: str = ""  # where Q[b,h,t,d] comes from, e.g. "q_proj[b, t, 64*h + d]"
    k_map: str = ""
    v_map: str = ""
    softmax_dtype: str = ""
    dropout_p: float = 0.0
    kv_source: KvSource = "contiguous"
    training: bool = False
    reason: Reason | None = None  # set: declined

    @property
    def group(self) -> sympy.Basic:
        """Query heads per KV head."""
        return self.query_heads / self.kv_heads

    def __str__(self) -> str:
        heads = f"Hq {self.query_heads} Hkv {self.kv_heads} D {self.head_dim}"
        tail = f"declined, {self.reason}" if self.reason else f"mask {self.mask}"
        return f"{self.name}: {heads} scale {self.scale:.6g}, {tail}"


class KernelPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What will replace a site."""

    kernel: str  # "sdpa", "flex_attention", "block_sparse_attention", "selected_attention", ...
    loop_order: str = ""  # of our templates; "" for others, or if chosen at each call
    flags: dict[str, Any] = {}  # e.g. {"is_causal": True, "enable_gqa": True}
    why: str
    policy: str = "exact"  # what it promises
    not_policy: Reason | None = None  # why it does not promise what the user asked for

    def __str__(self) -> str:
        return f"{self.kernel}: {self.why}"


def number_text(value: sympy.Basic) -> str:
    """A number with at most six digits, anything else as sympy prints it."""
    return f"{float(value):.6g}" if value.is_number else str(value)


T = TypeVar("T")
_LOCALS = {
    **{str(symbol): symbol for symbol in (*expressions.INDICES, expressions.x)},
    **{function.__name__: function for function in (Load, Where, Truth)},
}


def to_builtins(value: Any) -> Any:
    """Plain JSON types; expressions become `sympy.srepr` strings."""
    return msgspec.to_builtins(
        value, enc_hook=lambda v: sympy.srepr(v) if isinstance(v, sympy.Basic) else v
    )


def from_builtins(data: Any, kind: type[T]) -> T:
    """The inverse of `to_builtins`.

    Raises:
        msgspec.ValidationError: `data` is not what `to_builtins` gives for `kind`.
    """

    def decode(wanted: type, text: Any) -> Any:
        return sympy.sympify(text, locals=_LOCALS)

    return msgspec.convert(data, kind, dec_hook=decode)
