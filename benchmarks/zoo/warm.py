"""Imported once by the process that the workers are forked from: what most models need."""

from __future__ import annotations

import contextlib
import importlib
import warnings

warnings.simplefilter("ignore")
COMMON = (
    "sparse_compile.backend",
    "sparse_compile.pipeline",
    "torch._inductor.compile_fx",
    "benchmarks.zoo.torchvision_schemas",
    "PIL.Image",
    "einops",
    "torchvision",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "timm",
)

for name in COMMON:
    with contextlib.suppress(Exception):  # packages of the zoo are optional and may be broken
        importlib.import_module(name)
