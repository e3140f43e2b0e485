"""Which kernel computes a proven attention fastest: a table of measured cases.

`benchmarks/block_sparse.py --write-table` writes it. A case that nobody measured on a device goes to
flex_attention.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import sympy

from sparse_compile import expressions as ex
from sparse_compile.expressions import Load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from sparse_compile.ir import MaskAtom, ScoreProgram

Kernel = Literal["flex_attention", "block_sparse_attention"]
DEFAULT: Kernel = "flex_attention"
FILE = "winners.toml"


class Winner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The faster kernel of a case."""

    device: str  # as torch.cuda.get_device_name says
    case: str  # as `case_of` says
    tokens: int  # queries and keys
    inference: Kernel  # the faster forward
    training: Kernel  # the faster forward and backward together


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    winner: tuple[Winner, ...] = ()


def case_of(atoms: Iterable[MaskAtom], program: ScoreProgram) -> str:
    """The name of a program's case: kinds of its mask and of its score, such as `causal+soft_cap`."""
    parts = sorted({atom.kind for atom in atoms})
    score = program.score
    if score.has(sympy.tanh):
        parts.append("soft_cap")
    if score.has(ex.s) or score.has(ex.t):
        is_slope = not any(load.has(ex.s, ex.t) for load in score.atoms(Load))
        parts.append("alibi" if is_slope else "bias")
    if program.sink is not None:
        parts.append("sink")
    return "+".join(parts) or "dense"


@functools.cache
def shipped() -> tuple[Winner, ...]:
    """The table that comes with the package."""
    return parse(resources.files("sparse_compile").joinpath(FILE).read_text(encoding="utf-8"))


def parse(text: str) -> tuple[Winner, ...]:
    """A table from its text.

    Raises:
        msgspec.ValidationError: It has unknown keys, or values of a wrong type.
    """
    return msgspec.convert(tomllib.loads(text), _File).winner


def write(winners: Sequence[Winner], path: Path) -> None:
    """Put winners into a table's file; those of other devices and cases stay."""
    replaced = {(one.device, one.case, one.tokens) for one in winners}
    old = parse(path.read_text(encoding="utf-8")) if path.exists() else ()
    kept = [one for one in old if (one.device, one.case, one.tokens) not in replaced]
    lines = ["# Written by benchmarks/block_sparse.py --write-table."]
    for one in sorted([*kept, *winners], key=lambda one: (one.device, one.case, one.tokens)):
        lines += ["", "[[winner]]"]
        for key, value in msgspec.to_builtins(one).items():
            lines.append(f"{key} = {value}" if isinstance(value, int) else f'{key} = "{value}"')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def kernel_for(
    case: str, *, device: str, tokens: int | None, training: bool,
    table: Sequence[Winner] | None = None,
) -> tuple[Kernel, str]:  # fmt: skip
    """The faster kernel of a case, and why.

    Args:
        case: As `case_of` says.
        device: As torch.cuda.get_device_name says.
        tokens: How many keys; None where that is not known.
        training: Whether gradients are computed too.
        table: What was measured; what is shipped if left out.
    """
    table = shipped() if table is None else table
    found = [one for one in table if one.device == device and one.case == case]
    if not found:
        return DEFAULT, f"{case} was not measured on this device"
    smaller = [one for one in found if tokens is not None and one.tokens <= tokens]
    # between two measured lengths, what held at the shorter one
    nearest = max(smaller or found, key=lambda one: one.tokens if smaller else -one.tokens)
    kernel = nearest.training if training else nearest.inference
    return kernel, f"the faster one for {case} at {nearest.tokens} tokens"
