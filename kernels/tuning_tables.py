"""Tuning tables: what can be tuned in a kernel, from which values, and what holds until then.

One TOML file a kernel, in `tables/` beside the kernels:

    kernel = "page_bound"           # as the file is called
    module = "page_bound"           # the Python file of its Triton functions and its `Tiles`
    key = ["head_dim", "n_pages:pow2", "n_tokens:nearest"]
    [default]                       # instead of what the kernel's own `default_tiles` gives
    num_warps = 4
    [[space]]                       # every combination is tried; `when` may speak of values too
    when = "head_dim * itemsize <= 256 and block_l * num_warps <= 256"
    block_l = [16, 32, 64]
    num_warps = [2, 4, 8]

Values are fields of the module's `Tiles`; those that a table or a result leaves out are as the
kernel computes them from the sizes. A fact of the key with `:pow2` is rounded up to a power of two
before lookup. One with `:nearest` too, and where it was not tuned, the nearest that was serves, up
to a factor of 4 away: that is for facts which no value's legality depends on. Conditions may also
speak of `itemsize`.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgspec

from sparse_compile.config_file import parse_toml
from sparse_compile.errors import ConfigError
from sparse_compile.kernels.conditions import Condition
from sparse_compile.option_checks import nearest, shown

if TYPE_CHECKING:
    from importlib.abc import Traversable

NEAR = 4  # how far off, as a factor, a tuned `:nearest` fact may be
ADVICE = "`sparse-compile tune --check` validates all tables without a GPU."
Values = dict[str, int]  # by the names of the fields of `Tiles`


class Rule(NamedTuple):
    """Which values a parameter may have."""

    low: int
    high: int
    power_of_two: bool

    def allows(self, value: object) -> bool:
        """Whether a kernel can be compiled with it."""
        if type(value) is not int or not self.low <= value <= self.high:
            return False
        return not self.power_of_two or value & (value - 1) == 0

    def __str__(self) -> str:
        kind = "power of two " if self.power_of_two else ""
        return f"an integer {kind}from {self.low} to {self.high}"


def rule(parameter: str) -> Rule:
    """The rule of a parameter, by its name."""
    return {
        "block_m": Rule(16, 256, True),  # sides of tiles; products need at least 16
        "block_n": Rule(16, 256, True),
        "num_warps": Rule(1, 16, True),
        "num_stages": Rule(1, 8, False),
        "registers": Rule(24, 255, False),
        "local_registers": Rule(24, 255, False),
    }.get(parameter, Rule(1, 2**20, parameter.startswith("block_")))


class Fact(NamedTuple):
    """A part of the key."""

    name: str
    kind: str  # "": as it is; "pow2" or "nearest": rounded up to a power of two

    def bucket(self, value: int) -> int:
        """What is looked up."""
        return round_up(value) if self.kind else value

    def __str__(self) -> str:
        return f"{self.name}:{self.kind}" if self.kind else self.name


def round_up(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length() if value > 1 else 1


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """Combinations to try."""

    when: Condition | None
    values: dict[str, tuple[int, ...]]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """What can be tuned in one kernel."""

    kernel: str
    module: str
    key: tuple[Fact, ...]
    names: tuple[str, ...]  # of all values
    default: Values
    spaces: tuple[Space, ...] = ()

    def candidates(self, facts: Mapping[str, int]) -> list[Values]:
        """All that is worth trying for a key, the default first; `facts` are with `itemsize`."""
        found = [self.default]
        for space in self.spaces:
            for chosen in itertools.product(*space.values.values()):
                values = dict(zip(space.values, chosen, strict=True))
                if space.when is None or space.when({**facts, **values}):
                    values = {**self.default, **values}
                    if values not in found:
                        found.append(values)
        return found

    def bucketed(self, facts: Mapping[str, int]) -> dict[str, int]:
        """The key of a problem."""
        return {fact.name: fact.bucket(facts[fact.name]) for fact in self.key}

    def check_values(self, values: Mapping[str, Any], origin: str) -> None:
        """Refuse values that the kernel does not have, or that are illegal.

        Raises:
            ConfigError: The message begins with `origin`.
        """
        for name, value in values.items():
            if name not in self.names:
                _refuse_name(origin, name, self.names)
            _check_value(f"{origin}.{name}", value, name)


def kernels_folder() -> Traversable:
    """Where the kernels' sources are; maybe in an archive."""
    return resources.files("sparse_compile").joinpath("kernels")


def folder() -> Traversable:
    """Where the tables and the results that come with the package are."""
    return kernels_folder().joinpath("tables")


def names() -> list[str]:
    """Every kernel that has a table."""
    files = (file.name for file in folder().iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


@functools.cache
def load(kernel: str) -> Table:
    """The table of a kernel.

    Raises:
        ConfigError: There is none, or it is wrong.
    """
    origin = f"tables/{kernel}.toml"
    file = folder().joinpath(f"{kernel}.toml")
    if not file.is_file():
        raise ConfigError(
            f'there is no tuning table for the kernel "{kernel}".\n'
            f"  Expected one of: {', '.join(names())}.\n"
            f"  {nearest(kernel, names()) or 'Correct the name.'}"
        )
    return parse(file.read_text(encoding="utf-8"), origin, kernel)


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    kernel: str
    module: str
    key: list[str]
    default: dict[str, Any] = {}
    space: list[dict[str, Any]] = []


def parse(text: str, origin: str, kernel: str) -> Table:
    """A table from the text of its file.

    Args:
        text: The TOML.
        origin: The file's name for messages.
        kernel: What the table must be about.

    Raises:
        ConfigError: The message has the file and the path of what is wrong.
    """
    raw = parse_toml(text, origin)
    file = convert(raw, _File, origin)
    if file.kernel != kernel:
        _refuse(f"{origin}: kernel", shown(file.kernel), f'"{kernel}", the name of the file')
    key = tuple(_fact(origin, i, text) for i, text in enumerate(file.key))
    names = tile_names(file.module, origin)
    if both := {fact.name for fact in key}.intersection(names):
        _refuse(f"{origin}: key", f"about {both.pop()}, which is tuned", "facts of the problem")
    table = Table(kernel=kernel, module=file.module, key=key, names=names, default=file.default)
    table.check_values(file.default, f"{origin}: default")
    spaces = [space(f"{origin}: space[{i}]", given, table) for i, given in enumerate(file.space)]
    return msgspec.structs.replace(table, spaces=tuple(spaces))


def tile_names(module: str, origin: str) -> tuple[str, ...]:
    """The fields of a module's `Tiles`, which it may import, read from its source.

    Raises:
        ConfigError: The module has none; the message begins with `origin`.
    """
    file = kernels_folder().joinpath(f"{module}.py")
    body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
    for node in body:
        if isinstance(node, ast.ImportFrom) and "Tiles" in [alias.name for alias in node.names]:
            return tile_names((node.module or "").rpartition(".")[2], origin)
    classes = (node for node in body if isinstance(node, ast.ClassDef) and node.name == "Tiles")
    tiles = next(classes, None)
    if tiles is None:
        _refuse(f"{origin}: module", shown(module), "a module of kernels with a class `Tiles`")
    fields = (field.target for field in tiles.body if isinstance(field, ast.AnnAssign))
    return tuple(field.id for field in fields if isinstance(field, ast.Name))


def space(at: str, given: Mapping[str, Any], table: Table) -> Space:
    """A search space from its TOML table.

    Raises:
        ConfigError: The message begins with `at`, the file and the path.
    """
    values: dict[str, tuple[int, ...]] = {}
    for name, listed in given.items():
        if name == "when":
            continue
        if name not in table.names:
            _refuse_name(at, name, (*table.names, "when"))
        if not isinstance(listed, list) or not listed:
            _refuse(f"{at}.{name}", shown(listed), f"a list, each {rule(name)}")
        for i, value in enumerate(listed):
            _check_value(f"{at}.{name}[{i}]", value, name)
        values[name] = tuple(listed)
    if not values:
        _refuse(at, "empty", f"lists of values for some of {', '.join(table.names)}")
    known = {"itemsize", *values, *(fact.name for fact in table.key)}
    when = _condition(at, given["when"], known) if "when" in given else None
    return Space(when=when, values=values)


def _fact(origin: str, number: int, text: str) -> Fact:
    name, _, kind = text.partition(":")
    if not name.isidentifier() or text not in (name, f"{name}:pow2", f"{name}:nearest"):
        _refuse(f"{origin}: key[{number}]", shown(text), "a name, name:pow2 or name:nearest")
    return Fact(name, kind)


def _condition(at: str, text: Any, known: Iterable[str]) -> Condition:
    if not isinstance(text, str):
        _refuse(f"{at}.when", shown(text), "a condition in quotes")
    try:
        return Condition(text, known)
    except ValueError as error:
        raise ConfigError(
            f'{at}.when is "{text}".\n  Expected a condition; this one {error}.\n  {ADVICE}'
        ) from None


def _check_value(at: str, value: Any, parameter: str) -> None:
    if not rule(parameter).allows(value):
        advice = "Write the number without quotes; " if isinstance(value, str) else ""
        _refuse(at, shown(value), str(rule(parameter)), advice + ADVICE)


def convert(raw: Any, kind: Any, origin: str) -> Any:
    """Plain data as a struct.

    Raises:
        ConfigError: The message has `origin` and the path of what is wrong.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        path = path.strip("`.")
        where = f"{origin}: {path}" if path else origin
        value = raw
        for name, number in re.findall(r"(\w+)|\[(\d+)\]", path):
            value = value[int(number)] if number else value[name]
        if unknown := re.search(r"unknown field `(.*)`", problem):
            known = (field.encode_name for field in msgspec.structs.fields(kind))
            _refuse_name(where, unknown.group(1), [] if path else known)
        if missing := re.search(r"missing required field `(.*)`", problem):
            _refuse(f"{where}.{missing.group(1)}" if path else f"{where}: {missing.group(1)}",
                    "missing", "it to be given")  # fmt: skip
        if not problem.startswith("Expected"):  # a struct's own check
            raise ConfigError(f"{where}: {problem}.\n  Correct it.") from None
        expected = problem.partition(", got")[0].removeprefix("Expected ").replace("`", "")
        _refuse(where, shown(value), f"a value of type {expected}")


def _refuse(at: str, found: str, expected: str, advice: str = ADVICE) -> NoReturn:
    raise ConfigError(f"{at} is {found}.\n  Expected {expected}.\n  {advice}")


def _refuse_name(at: str, name: str, known: Iterable[str]) -> NoReturn:
    names = sorted(known)
    expected = f"only {', '.join(names)}" if names else "no such key"
    advice = nearest(name, names) or ADVICE
    raise ConfigError(f'{at} has the unknown key "{name}".\n  Expected {expected}.\n  {advice}')
