"""Where a node of a Dynamo graph comes from: module path and source line."""

from __future__ import annotations

import os
import re
from collections import Counter

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = os.path.dirname(torch.__file__)
_PATH_PART = re.compile(r"_modules\['([^']*)'\]|\['([^']*)'\]|\[(\d+)\]|\.?(\w+)")


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that a node was traced in, as `named_modules` spells it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    path = re.sub(r"^L\['[^']*'\]|^G\['[^']*'\]", "", str(path))
    parts = []
    for match in _PATH_PART.finditer(path):
        part = next(group for group in match.groups() if group is not None)
        if part not in ("_modules", "_orig_mod"):
            parts.append(part)
    return ".".join(parts)


def source_line(node: fx.Node) -> str:
    """`file:line` of the innermost frame of the model's own code."""
    trace = node.meta.get("stack_trace") or ""
    frames = _FRAME.findall(trace)
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    return "" if not own else f"{own[-1][0]}:{own[-1][1]}"


class UniqueNames:
    """Gives sites of one graph names that differ: a second one in a module is called `path#2`."""

    def __init__(self) -> None:
        """Start with no names taken."""
        self._taken: Counter[str] = Counter()

    def taken(self) -> Counter[str]:
        """How often each path was asked for so far."""
        return self._taken.copy()

    def restore(self, taken: Counter[str]) -> None:
        """Forget names given since `taken` was read."""
        self._taken = taken.copy()

    def __call__(self, node: fx.Node, fallback: str = "attention") -> str:
        """A name for the site at a Dynamo node."""
        path = module_path(node) or fallback
        self._taken[path] += 1
        return path if self._taken[path] == 1 else f"{path}#{self._taken[path]}"
