"""Triton's interpreter without its largest cost.

It replaces the functions of `tl` when a kernel is launched, and again at every call of a function
inside: `tl.sum` and `tl.cdiv` are such calls too. The second time changes nothing, and takes longer
than the arithmetic of a small tile.
"""

from __future__ import annotations

import functools
from typing import Any


def prepare_once_a_launch() -> None:
    """Let the functions that a kernel calls find `tl` as its launch left it."""
    import triton.language as tl
    from triton.runtime import interpreter

    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[int] = set()  # modules, in this launch

    def prepare_once(function: Any) -> Any:
        seen = {id(x) for x in function.__globals__.values() if x is tl or x is tl.core}
        if seen and seen <= prepared:
            return interpreter._LangPatchScope()  # of no change
        prepared.update(seen)
        return prepare(function)

    @functools.wraps(launch)
    def launch_prepared(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang = prepare_once
    interpreter.GridExecutor.__call__ = launch_prepared
