"""Which versions of PyTorch and Triton this library works with."""

from __future__ import annotations

import re

from sparse_compile.errors import UnsupportedEnvironmentError

MINIMUM_TORCH = (2, 11)
NEWEST_TESTED_TORCH = (2, 15)
MINIMUM_TRITON = (3, 6)
MINIMUM_TRANSFORMERS = (5, 10, 4)


def release(version: str) -> tuple[int, ...]:
    """The numbers a version starts with: `"2.13.0+cpu"` -> `(2, 13, 0)`; empty for none."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def version_text(numbers: tuple[int, ...]) -> str:
    """`(2, 11)` -> `"2.11"`."""
    return ".".join(str(number) for number in numbers)


def check_torch(version: str) -> None:
    """Refuse a PyTorch that is too old.

    Args:
        version: `torch.__version__`.

    Raises:
        UnsupportedEnvironmentError: `version` is older than `MINIMUM_TORCH` or no version.
    """
    if release(version) < MINIMUM_TORCH:
        need = version_text(MINIMUM_TORCH)
        raise UnsupportedEnvironmentError(
            f'backend "sparse_compile": the installed torch is {version}.\n'
            f"  Expected torch {need} or newer.\n"
            f"  Upgrade it, for example with: pip install 'torch>={need}'"
        )


def check_gpu() -> None:
    """Refuse a machine where PyTorch sees no GPU.

    Raises:
        UnsupportedEnvironmentError: There is none.
    """
    import torch

    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        found = f"torch {torch.__version__} sees none"
        found += f" (built for {build})" if build else " (a build for the CPU only)"
        raise UnsupportedEnvironmentError(
            f"a GPU was asked for but is absent: {found}.\n"
            "  Expected a CUDA device that torch.cuda.is_available() reports.\n"
            "  Install a CUDA build of torch and check that nvidia-smi lists the device, "
            "or do not ask for a GPU."
        )
