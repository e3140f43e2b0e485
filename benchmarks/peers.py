"""Published kernels for the same work, imported from checkouts outside this repository.

`--peers DIR` names a folder that holds checkouts under the names of their repositories:

    Flash-Sparse-Attention          Relaxed-System-Lab: FSA, and NSA as its reference
    native-sparse-attention-triton  XunhaoLai
    flash-linear-attention          fla-org

Here are only their names, layouts and limits. A checkout that cannot be imported is left out, and
the reason recorded.
"""

from __future__ import annotations

import functools
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZE, SINKS, LOCAL = 64, 1, 2  # the last two are fixed in flash-linear-attention


class Peer(ABC):
    """One library, with the conversions between its layout and ours."""

    name: str
    compression = (32, 16)  # tokens of a compressed key, and from one to the next
    pools_itself = False  # whether its core makes the compressed keys, by taking means

    def refuses(self, group: int) -> str | None:
        """Why it does not take a group, None if it does."""
        return None

    @abstractmethod
    def heads_in(self, x: Tensor) -> Tensor:
        """[B, H, T, D], or gates, as this library wants them, contiguous."""

    @abstractmethod
    def heads_out(self, x: Tensor) -> Tensor:
        """What it gives, as [B, H, T, D]."""

    @abstractmethod
    def lists_in(self, block_indices: Tensor) -> Tensor:
        """[B, Hkv, T, K] as this library wants it."""

    @abstractmethod
    def lists_out(self, block_indices: Tensor) -> Tensor:
        """What it chose, as [B, Hkv, T, K]."""

    @abstractmethod
    def selected(self, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Tensor:
        """Selected attention in its layout."""

    @abstractmethod
    def compress_and_choose(
        self, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, n_selected: int
    ) -> tuple[Tensor, Tensor]:
        """Compressed attention and the choice of KV blocks, in its layout."""

    @abstractmethod
    def core(self, inputs: dict[str, Tensor], n_selected: int, window: int) -> Tensor:
        """The three branches, each times its gate, in its layout."""


class Packed(Peer):
    """A library whose tensors are [tokens, heads, size] with the bounds of packed sequences."""

    def __init__(self, name: str, selected: Callable[..., Tensor], compressed: Callable[..., Any],
                 *, wide_group: Callable[..., Tensor] | None = None,
                 **choice: Any) -> None:  # fmt: skip
        """Name the functions.

        Args:
            name: In tables.
            selected: Its selected attention.
            compressed: Its compressed attention, which chooses KV blocks too.
            wide_group: What its module calls instead of `selected` for groups above 8.
            choice: Options of `compressed` that its module gives.
        """
        self.name = name
        self._selected, self._compressed = selected, compressed
        self._wide_group, self._choice = wide_group, choice

    def heads_in(self, x: Tensor) -> Tensor:
        """[T, H, D]."""
        return x[0].transpose(0, 1).contiguous()

    def heads_out(self, x: Tensor) -> Tensor:
        """[1, H, T, D]."""
        return x.transpose(0, 1)[None]

    def lists_in(self, block_indices: Tensor) -> Tensor:
        """[Hkv, T, K]."""
        return block_indices[0].contiguous()

    def lists_out(self, block_indices: Tensor) -> Tensor:
        """[1, Hkv, T, K]."""
        return block_indices[None]

    def selected(self, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Tensor:
        """Selected attention, [T, Hq, D]."""
        bounds = _bounds(q.shape[0], q.device)
        return self._selected(q, k, v, block_indices, BLOCK_SIZE, bounds, None)

    def compress_and_choose(
        self, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, n_selected: int
    ) -> tuple[Tensor, Tensor]:
        """Compressed attention, [T, Hq, D], and lists, [Hkv, T, K]."""
        n_tokens, n_compressed = q.shape[0], k_cmp.shape[0]
        return self._compressed(
            q, k_cmp, v_cmp, *self.compression, BLOCK_SIZE, n_selected,
            _bounds(n_tokens, q.device), _bounds(n_compressed, q.device), n_tokens, n_compressed,
            None, SINKS, LOCAL, **self._choice,
        )  # fmt: skip

    def core(self, inputs: dict[str, Tensor], n_selected: int, window: int) -> Tensor:
        """What its module does between the projections, [T, Hq, D]."""
        q, k, v, gates = (inputs[name] for name in ("q", "k", "v", "gates"))
        compressed, lists = self.compress_and_choose(
            q, inputs["k_cmp"], inputs["v_cmp"], n_selected
        )
        select = self._selected
        if self._wide_group is not None and q.shape[1] > 8 * k.shape[1]:
            select = self._wide_group
        selected = select(q, k, v, lists, BLOCK_SIZE, _bounds(q.shape[0], q.device), None)
        near = flash_window(q[None], k[None], v[None], window)[0]
        return gates[..., 0:1] * compressed + gates[..., 1:2] * selected + gates[..., 2:3] * near


class FlashLinearAttention(Peer):
    """flash-linear-attention: [B, T, H, D], means of 64 keys as compressed keys, groups from 16."""

    name = "fla"
    compression = (BLOCK_SIZE, BLOCK_SIZE)
    pools_itself = True

    def __init__(self, module: Any) -> None:
        """Take `fla.ops.nsa.parallel`."""
        self._module = module

    def refuses(self, group: int) -> str | None:
        """Groups below 16 and other than powers of two."""
        if group >= 16 and group & (group - 1) == 0:
            return None
        return "groups must be powers of two from 16"

    def heads_in(self, x: Tensor) -> Tensor:
        """[B, T, H, D]."""
        return x.transpose(1, 2).contiguous()

    def heads_out(self, x: Tensor) -> Tensor:
        """[B, H, T, D]."""
        return x.transpose(1, 2)

    lists_in, lists_out = heads_in, heads_out

    def selected(self, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> Tensor:
        """Selected attention, [B, T, Hq, D]."""
        attend = self._module.ParallelNSAFunction.apply
        n_selected = block_indices.shape[-1]
        return attend(q, k, v, block_indices, n_selected, BLOCK_SIZE, k.shape[-1] ** -0.5, None)

    def compress_and_choose(
        self, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, n_selected: int
    ) -> tuple[Tensor, Tensor]:
        """Compressed attention, [B, T, Hq, D], and lists, [B, T, Hkv, K]."""
        n_tokens, scale = q.shape[1], q.shape[-1] ** -0.5
        # it counts the last, incomplete block too, though no query reads it
        missing = -(-n_tokens // BLOCK_SIZE) - k_cmp.shape[1]
        if missing:
            k_cmp, v_cmp = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (k_cmp, v_cmp))
        compressed, lse = self._module.parallel_nsa_compression(
            q=q, k=k_cmp, v=v_cmp, TK=n_tokens, block_size=BLOCK_SIZE, scale=scale
        )
        lists = self._module.parallel_nsa_topk(
            q=q.detach(), k=k_cmp.detach(), lse=lse.detach(), TK=n_tokens, block_size=BLOCK_SIZE,
            block_counts=n_selected, scale=scale,
        )  # fmt: skip
        return compressed, lists

    def core(self, inputs: dict[str, Tensor], n_selected: int, window: int) -> Tensor:
        """Its function for all branches; the window it would take from the package flash_attn."""
        q, k, v, gates = (inputs[name] for name in ("q", "k", "v", "gates"))
        compressed, selected, near = (gate.squeeze(-1) for gate in gates.split(1, dim=-1))
        out = self._module.parallel_nsa(
            q, k, v, g_cmp=compressed, g_slc=selected, block_counts=n_selected,
            block_size=BLOCK_SIZE, window_size=0,
        )  # fmt: skip
        return torch.addcmul(out, flash_window(q, k, v, window), near.unsqueeze(-1))


def flash_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """FlashAttention-2, as it comes with PyTorch, on the last `window` keys; [B, T, H, D]."""
    n_tokens = q.shape[1]
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, n_tokens, n_tokens, 0.0, True, False,
        window_size_left=window - 1, window_size_right=0,
    )[0]  # fmt: skip


@functools.lru_cache(maxsize=8)
def _bounds(n_tokens: int, device: torch.device) -> Tensor:
    return torch.tensor([0, n_tokens], dtype=torch.int32, device=device)


def _fsa() -> Peer:
    fsa = importlib.import_module("fsa.ops")
    reference = importlib.import_module("nsa_ref.ops")
    return Packed(
        "fsa",
        fsa.FSA_topk_sparse_attention,
        reference.compressed_attention,
        wide_group=reference.topk_sparse_attention,
        parallel_topk_compute=False,
    )


def _nsa_reference() -> Peer:
    ops = importlib.import_module("nsa_ref.ops")
    return Packed(
        "nsa_reference",
        ops.topk_sparse_attention,
        ops.compressed_attention,
        parallel_topk_compute=False,
    )


def _xunhaolai() -> Peer:
    ops = importlib.import_module("native_sparse_attention.ops")
    return Packed("xunhaolai", ops.topk_sparse_attention, ops.compressed_attention)


def _fla() -> Peer:
    return FlashLinearAttention(importlib.import_module("fla.ops.nsa.parallel"))


LOADERS: dict[str, tuple[str, Callable[[], Peer]]] = {
    "fsa": ("Flash-Sparse-Attention", _fsa),
    "nsa_reference": ("Flash-Sparse-Attention", _nsa_reference),
    "xunhaolai": ("native-sparse-attention-triton", _xunhaolai),
    "fla": ("flash-linear-attention", _fla),
}


def load(folder: Path | None) -> tuple[list[Peer], dict[str, str]]:
    """Import what a folder of checkouts holds.

    Args:
        folder: The folder, None for no peers.

    Returns:
        The libraries that can be imported, and of the others why not, by name.
    """
    if folder is None:
        return [], dict.fromkeys(LOADERS, "no --peers DIR")
    found, missing = [], {}
    for name, (repository, make) in LOADERS.items():
        path = folder.resolve() / repository
        if not path.is_dir():
            missing[name] = f"{repository} is not in the folder of --peers"
            continue
        if str(path) not in sys.path:
            sys.path.append(str(path))  # behind our own: one of them has a folder `benchmarks` too
        try:
            found.append(make())
        except Exception as error:  # whatever a foreign module raises when it is imported
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing
