"""Which problems are tuned: a built-in list, a file's, or those of a model's attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from sparse_compile.errors import TargetError

if TYPE_CHECKING:
    from sparse_compile.ir import AttentionSite

DTYPES = ("float16", "bfloat16", "float32")


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of one attention, and of what a sparse kernel reads of it."""

    tokens: int
    keys: int = 0  # 0: as many as tokens
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    value_dim: int = 0  # 0: head_dim
    batch: int = 1
    block_size: int = 64
    slots: int = 16  # KV blocks that a token selects
    window: int = 512

    def __post_init__(self) -> None:
        """Fill in the sizes that follow from others, and refuse impossible ones."""
        msgspec.structs.force_setattr(self, "keys", self.keys or self.tokens)
        msgspec.structs.force_setattr(self, "value_dim", self.value_dim or self.head_dim)
        for name, value in msgspec.structs.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; at least 1 is needed")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} KV heads do not divide {self.query_heads}")
        if self.block_size not in (16, 32, 64, 128):
            raise ValueError(f"block_size is {self.block_size}; 16, 32, 64 or 128 is needed")
        if self.slots > 64 or max(self.head_dim, self.value_dim) > 256:
            raise ValueError("at most 64 slots and head sizes up to 256 are possible")

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query_heads // self.kv_heads

    def shortened(self, tokens: int) -> Shape:
        """The same, with at most so many tokens and keys; still a multiple of 16 if it was."""
        less = min(self.tokens, tokens)
        return msgspec.structs.replace(self, tokens=less, keys=max(less, min(self.keys, tokens)))

    def __str__(self) -> str:
        keys = f" S{self.keys}" if self.keys != self.tokens else ""
        value = f"/{self.value_dim}" if self.value_dim != self.head_dim else ""
        return (
            f"B{self.batch} Hq{self.query_heads} Hkv{self.kv_heads} T{self.tokens}{keys} "
            f"D{self.head_dim}{value} K{self.slots}x{self.block_size}"
        )


LIST = tuple(
    Shape(tokens=tokens, kv_heads=32 // group, head_dim=head_dim)
    for head_dim in (128, 64)
    for group in (4, 16, 1)
    for tokens in (32768, 8192)
)


def of_model(target: str) -> list[tuple[Shape, str]]:
    """The shapes and dtypes of the attention in a model, each once.

    Args:
        target: `module:callable` or what else `sparse-compile inspect` takes.

    Raises:
        TargetError: It is not found, or holds no attention of known sizes that kernels can take.
    """
    import torch

    from sparse_compile import backend
    from sparse_compile.inspect.targets import load_target

    loaded = load_target(target)
    with torch.no_grad():
        report = backend.explain(loaded.model, *loaded.args, **loaded.kwargs)
    found = dict.fromkeys(one for site in report.sites for one in _of_site(site.site))
    if not found:
        raise TargetError(
            f"TARGET {target!r} has {len(report.sites)} attention sites, none to tune for.\n"
            "  Expected one that is proven, with sizes that are numbers, head size up to 256 and "
            f"dtype {', '.join(DTYPES)}.\n"
            f"  `sparse-compile inspect {target}` shows each with its sizes."
        )
    return list(found)


def _of_site(site: AttentionSite | None) -> Iterator[tuple[Shape, str]]:
    if site is None or site.dtype not in DTYPES:
        return
    sizes = {
        "batch": site.batch, "query_heads": site.query_heads, "kv_heads": site.kv_heads,
        "tokens": site.query_tokens, "keys": site.key_tokens, "head_dim": site.head_dim,
        "value_dim": site.value_dim,
    }  # fmt: skip
    if all(size.is_Integer for size in sizes.values()):
        try:
            yield Shape(**{name: int(size) for name, size in sizes.items()}), site.dtype
        except ValueError:
            return  # no kernel takes it
