"""Models of other people's packages, tiny, with random weights; each package is optional."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.zoo.third_party import diffusion, lucidrains, others, timm_models

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Entry


# A few of each package for the tests, where it is installed.
CI = frozenset(
    f"{package}-{name}"
    for package, names in {
        "x-transformers": (
            "decoder-plain",
            "decoder-alibi",
            "decoder-memory-kv",
            "encoder-t5-bias",
        ),
        "vit-pytorch": ("vit", "cross_vit", "nest"),
        "timm": ("vit_tiny_patch16_224",),
        "diffusers": ("AutoencoderKL-classic",),
        "openai-whisper": ("whisper",),
        "segment-anything": ("encoder",),
        "local-attention": ("mha-causal",),
        "litgpt": ("llama",),
    }.items()
    for name in names
)


def entries() -> Iterator[Entry]:
    """Every entry; one whose package is missing raises `UnavailableError` when it is built."""
    yield from lucidrains.entries()
    yield from timm_models.entries()
    yield from diffusion.entries()
    yield from others.entries()
