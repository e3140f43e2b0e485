"""The operator by which a compiled forward pass asks the host for pages, before it writes tokens.

Which page comes next is for the host to decide, and a compiled pass has no host code of its own. The
operator is that code: it looks at no value of the device and waits for nothing. A CUDA graph cannot
hold it, and it says so: the graph is cut there.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_compile.errors import PageError

if TYPE_CHECKING:
    from sparse_compile.runtime.paged_rows import PagedRows

OP = "sparse_compile::paged_reserve"

# an operator can be given tensors and numbers only: a number stands for the rows
_numbers = itertools.count()
_rows: weakref.WeakValueDictionary[int, PagedRows] = weakref.WeakValueDictionary()

torch.library.define(
    OP,
    "(Tensor(a!) block_table, Tensor handle, SymInt n_tokens) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def handle_of(rows: PagedRows) -> Tensor:
    """What stands for some rows in a graph, as long as they live: a CPU tensor of one number.

    A number of Python would be compiled into the graph.
    """
    number = next(_numbers)
    _rows[number] = rows
    return torch.tensor(number)


def reserve(block_table: Tensor, handle: Tensor, n_tokens: int) -> None:
    """Make room for tokens at the end of every row, and write the new pages into the block table.

    Raises:
        OutOfPagesError: The pool has too few pages left; nothing was changed.
        TooLongError: The rows would get too long; nothing was changed.
        PageError: The rows do not exist any more.
    """
    rows = _rows.get(int(handle))
    if rows is None:
        raise PageError(
            f"handle {int(handle)} stands for no rows.\n"
            "  Expected the handle of rows that still exist.\n"
            "  Keep the cache that a compiled model was called with while it runs."
        )
    rows.reserve(dict.fromkeys(range(len(rows.tables)), n_tokens), block_table)


torch.library.impl(OP, "CompositeExplicitAutograd", reserve)


@torch.library.register_fake(OP)
def _reserve_fake(block_table, handle, n_tokens):
    return None
