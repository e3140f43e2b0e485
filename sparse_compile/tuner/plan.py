"""What a run of the tuner does: from a TOML file, with the command line on top.

kernels = ["range_forward"]         # all if left out
dtypes = ["bfloat16"]
budget = "5m"                       # no job begins later
shapes = "list"                     # or "from:module:callable", or tables as these:
[[shape]]
tokens = 8192
kv_heads = 4
[[space]]                           # instead of the spaces of the kernel's table
kernel = "range_forward"
block_m = [64, 128]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sparse_compile.config_file import read_toml
from sparse_compile.errors import ConfigError
from sparse_compile.kernels import tuning_tables
from sparse_compile.kernels.tuning_tables import Space
from sparse_compile.tuner import shapes as known_shapes
from sparse_compile.tuner.shapes import DTYPES, Shape


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    kernels: list[str] = []
    dtypes: list[str] = []
    budget: str | None = None
    shapes: str | None = None
    shape: list[Shape] = []
    space: list[dict[str, Any]] = []


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to tune, checked."""

    kernels: tuple[str, ...]
    problems: tuple[tuple[Shape, str], ...]  # with their dtypes
    budget_s: float
    spaces: dict[str, tuple[Space, ...]]


def read(
    config: Path | None = None, *, kernels: Sequence[str] = (), dtypes: Sequence[str] = (),
    budget: str | None = None, shapes: str | None = None, interpreted: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a file with what the command line gives on top.

    Args:
        config: The TOML file.
        kernels: Tables to tune; all by default.
        dtypes: Of the inputs; bfloat16 by default, and float32 where kernels are interpreted.
        budget: A duration as `5m`.
        shapes: `list`, or `from:` and a model as `sparse-compile inspect` takes it.
        interpreted: Whether there is no GPU: the built-in list is too large then.

    Raises:
        ConfigError: Something is unknown or cannot be read.
        TargetError: The model is not found, or has nothing to tune for.
    """
    file = _File()
    if config is not None:
        file = tuning_tables.convert(read_toml(config), _File, str(config))
    return Plan(
        kernels=_kernels(kernels or file.kernels),
        problems=_problems(
            dtypes or file.dtypes, shapes or file.shapes, () if shapes else file.shape, interpreted
        ),
        budget_s=_seconds(budget or file.budget),
        spaces=_spaces(config, file.space),
    )


def _kernels(wanted: Sequence[str]) -> tuple[str, ...]:
    for kernel in wanted:
        tuning_tables.load(kernel)
    return tuple(dict.fromkeys(wanted or tuning_tables.names()))


def _problems(
    dtypes: Sequence[str], shapes: str | None, given: Sequence[Shape], interpreted: bool
) -> tuple[tuple[Shape, str], ...]:
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ConfigError(f'dtype is "{dtype}".\n  Expected one of {", ".join(DTYPES)}.')
    if shapes is not None and shapes.startswith("from:"):
        found = known_shapes.of_model(shapes.removeprefix("from:"))
        return tuple((shape, dtype) for shape, dtype in found if not dtypes or dtype in dtypes)
    if shapes not in (None, "list"):
        raise ConfigError(
            f'shapes is "{shapes}".\n'
            '  Expected "list", or "from:" and a model as `sparse-compile inspect` takes it.\n'
            "  Shapes of your own are tables [[shape]] of a file given with --config."
        )
    if interpreted and not given:
        raise ConfigError(
            "shapes is the built-in list, which the interpreter cannot finish in hours.\n"
            "  Expected tiny shapes, since no GPU is here.\n"
            "  Write tables [[shape]] with tokens = 64 into a file and give it with --config."
        )
    dtypes = dtypes or ("float32" if interpreted else "bfloat16",)
    return tuple((shape, dtype) for dtype in dtypes for shape in given or known_shapes.LIST)


def _seconds(budget: str | None) -> float:
    if budget is None:
        return float("inf")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", budget)
    if match is None or not float(match[1]):
        raise ConfigError(
            f'budget is "{budget}".\n  Expected a duration such as 90s, 5m or 1h.\n  Correct it.'
        )
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _spaces(config: Path | None, given: list[dict[str, Any]]) -> dict[str, tuple[Space, ...]]:
    found: dict[str, tuple[Space, ...]] = {}
    for number, raw in enumerate(given):
        at = f"{config}: space[{number}]"
        kernel = raw.get("kernel")
        if kernel not in tuning_tables.names():
            known = ", ".join(tuning_tables.names())
            raise ConfigError(f"{at}.kernel is {kernel!r}.\n  Expected one of {known}.")
        table = tuning_tables.load(kernel)
        values = {name: value for name, value in raw.items() if name != "kernel"}
        space = tuning_tables.space(at, values, table)
        found[kernel] = (*found.get(kernel, ()), space)
    return found
