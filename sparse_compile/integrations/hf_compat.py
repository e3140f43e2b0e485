"""Everything that our caches know of transformers' insides; written for 5.10 to 5.23.

What differs between 5.17 and 5.23, and is handled here: layers that reuse the KV of others are dropped
from the end of the list (`num_kv_shared_layers`), or marked (`kv_sharing_modes`) and stand in it as
`DummyLayer`; masks of a compiled pass are left out for one query unless the cache calls itself
compilable (5.17), or kept wherever the length is a tensor (5.23). `get_layer_types_and_kwargs`
returns other things in each of them, and is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from sparse_compile.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Cache", "CacheLayerMixin", "layer_without_kv", "stored_layers"]

SLIDING = ("sliding_attention", "chunked_attention")
NOTHING_STORED = ("moe", "mlp", "dummy")


def stored_layers(config: PreTrainedConfig) -> list[str | None]:
    """What each layer of a decoder keeps: "full", "sliding", or None where it keeps nothing.

    Raises:
        ConfigError: A layer keeps something else than keys and values of tokens.
    """
    config = config.get_text_config(decoder=True)
    types = (
        getattr(config, "layer_types", None) or [_type_of_all(config)] * config.num_hidden_layers
    )
    found: list[str | None] = []
    for number, name in enumerate(types):
        if name not in ("full_attention", *SLIDING, *NOTHING_STORED):
            raise ConfigError(
                f'config.layer_types[{number}] is "{name}".\n'
                "  Expected full, sliding or chunked attention: pages hold keys and values of tokens.\n"
                "  Use DynamicCache for this model."
            )
        kind = "sliding" if name in SLIDING else "full"
        found.append(None if name in NOTHING_STORED else kind)
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        return [None if m == "reuse" else kind for m, kind in zip(modes, found, strict=True)]
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return found[: len(found) - shared]


def _type_of_all(config: PreTrainedConfig) -> str:
    has_window = getattr(config, "sliding_window", None) is not None
    has_chunks = getattr(config, "attention_chunk_size", None) is not None
    return SLIDING[0] if has_window or has_chunks else "full_attention"


def layer_without_kv() -> CacheLayerMixin:
    """What stands in a cache for a layer that keeps nothing."""
    return cache_utils.DummyLayer()
