"""Imported once by the process that the workers are forked from: what most models need."""

from __future__ import annotations

import contextlib
import importlib
import warnings

from benchmarks.zoo.torchvision_schemas import import_torchvision

warnings.simplefilter("ignore")
COMMON = (
    "sparse_compile.backend",
    "sparse_compile.pipeline",
    "torch._inductor.compile_fx",
    "PIL.Image",
    "einops",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "timm",
)

with contextlib.suppress(Exception):
    import_torchvision()
for name in COMMON:
    with contextlib.suppress(Exception):  # packages of the zoo are optional and may be broken
        importlib.import_module(name)
