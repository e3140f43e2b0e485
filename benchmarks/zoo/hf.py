"""Tiny random-weight models of every architecture that transformers has.

Each architecture gives up to three entries: its base model with eager attention and with SDPA, both
with right padding, and its main head class (language model, classifier, ...) without any mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.entry import Built, Entry
from benchmarks.zoo.hf_inputs import first_that_runs
from benchmarks.zoo.hf_overrides import (
    CI_EAGER,
    CI_SDPA,
    CI_TRAIN,
    CI_TWO_LAYERS,
    NO_SDPA,
    OVERRIDES,
    SKIPPED,
)
from benchmarks.zoo.shrink import LAYERS, shrink
from benchmarks.zoo.stir import stirred

PACKAGE = "transformers"
HEADS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "TIME_SERIES_PREDICTION",
    "PRETRAINING",
)


class UnavailableError(RuntimeError):
    """An architecture cannot be built here: a package is missing, or no configuration fits."""


def model_types() -> list[str]:
    """Every architecture with a base model, in alphabetical order."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(set(MODEL_MAPPING_NAMES) - SKIPPED)


def entries() -> Iterator[Entry]:
    """All entries; nothing is imported or built until one of them is."""
    for kind in model_types():
        for attention in ("eager", "sdpa"):
            if attention == "sdpa" and kind in NO_SDPA:
                continue
            tags = {"train"} if attention == "eager" else set()
            make = partial(build, kind, attention, padded=True)
            yield Entry(f"{kind}-{attention}", PACKAGE, make, frozenset(tags))
        head = _head_name(kind)
        if head is not None:
            make = partial(build, kind, "eager", padded=False, head=head)
            yield Entry(f"{kind}-{head}", PACKAGE, make)


def ci_entries() -> Iterator[Entry]:
    """The subset that tests run, with one layer where layers do not differ."""
    for attention, kinds in (("eager", CI_EAGER), ("sdpa", CI_SDPA)):
        for kind in kinds:
            layers = 2 if kind in CI_TWO_LAYERS else 1
            tags = {"train"} if attention == "eager" and kind in CI_TRAIN else set()
            make = partial(build, kind, attention, padded=True, layers=layers)
            yield Entry(f"{kind}-{attention}", PACKAGE, make, frozenset(tags))


def build(
    kind: str, attention: str, *, padded: bool, head: str | None = None, layers: int = LAYERS
) -> Built:
    """A tiny model of an architecture with inputs that it accepts.

    Args:
        kind: The `model_type` of its configuration.
        attention: `attn_implementation`.
        padded: Pass an attention mask with padding in it, where the model takes one.
        head: A class name instead of the base model.
        layers: Layers of each stack.
    Raises:
        UnavailableError: It cannot be built here.
    """
    import transformers

    transformers.logging.set_verbosity(50)
    try:
        config_class = transformers.CONFIG_MAPPING[kind]
        config = shrink(config_class, layers=layers, **OVERRIDES.get(kind, {}))
        model_class = getattr(transformers, head) if head else _base_class(config_class)
        make = partial(_make, model_class, _fitting(config, model_class), attention)
        inputs = first_that_runs(make(), padded)
        model = stirred(make, (), inputs)
    except Exception as error:  # hundreds of architectures refuse in as many ways
        raise UnavailableError(f"{kind}: {type(error).__name__}: {error}") from error
    return model, (), inputs


def _make(model_class: Any, config: Any, attention: str) -> nn.Module:
    return model_class._from_config(
        config, attn_implementation=attention, dtype=torch.float32
    ).eval()


def _fitting(config: Any, model_class: Any) -> Any:
    """The configuration itself, or the part of it that a class for one modality wants."""
    wanted = model_class.config_class or object
    parts = [part for part in vars(config).values() if isinstance(part, wanted)]
    return config if isinstance(config, wanted) or not parts else parts[0]


def _base_class(config_class: type) -> type:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    found = MODEL_MAPPING[config_class]
    return found[0] if isinstance(found, (list, tuple)) else found


def _head_name(kind: str) -> str | None:
    from transformers.models.auto import modeling_auto

    base = modeling_auto.MODEL_MAPPING_NAMES.get(kind)
    for task in HEADS:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", None)
        name = (names or modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES).get(kind)
        if isinstance(name, str) and name != base:
            return name
    return None
