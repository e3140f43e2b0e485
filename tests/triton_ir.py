"""Reads what Triton makes of a kernel before it knows threads (TTIR)."""

import re
from collections.abc import Iterator

_RESULT = re.compile(r"^\s*(%\w+)(?::\d+)? = (?:\"?)([\w.]+)")
_NAME = re.compile(r"%\w+")
_CARRIED = re.compile(r"(%\w+) = (%\w+)")
_ARGUMENT = re.compile(r"(%\w+): !tt\.ptr")
_FORWARDING = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast",
               "tt.reshape", "tt.trans", "arith.select")  # fmt: skip
_ACCESS = re.compile(r"\btt\.(load|store|atomic_rmw|atomic_cas)\b")


def overwritten(ttir: str) -> set[str]:
    """Arguments that a kernel loads from and later stores to, with no barrier between.

    The compiler may load twice, for threads in different layouts, and only one of those that share
    an element stores it: another may then load what is new already. An interpreter has one thread.
    """
    found: set[str] = set()
    loaded: set[str] = set()
    for what, arguments in _accesses(ttir):
        if what == "barrier":
            loaded.clear()
        elif what == "load":
            loaded |= arguments
        else:
            found |= loaded & arguments
    return {name.removeprefix("%") for name in found}


def _accesses(ttir: str) -> Iterator[tuple[str, set[str]]]:
    """Loads, stores and barriers in the order of the text, with the arguments that they are of."""
    roots: dict[str, set[str]] = {}
    for line in ttir.splitlines():
        text = line.partition(" loc(")[0] if "tt.func" not in line else line
        if "tt.func" in line:
            roots = {name: {name} for name in _ARGUMENT.findall(line)}
            continue
        if ".barrier" in text:
            yield "barrier", set()
        if "iter_args(" in text:
            for name, first in _CARRIED.findall(text.partition("iter_args(")[2]):
                roots[name] = roots.get(first, set())
        result = _RESULT.match(text)
        operands = _NAME.findall(text.partition(" = ")[2] if result else text)
        if result and result[2] in _FORWARDING:
            pointers = operands[:1] if result[2] == "tt.addptr" else operands
            roots[result[1]] = set().union(*(roots.get(name, set()) for name in pointers))
        access = _ACCESS.search(text)
        if access and operands:
            yield access[1], roots.get(operands[0], set())
