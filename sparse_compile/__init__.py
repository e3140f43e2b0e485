"""A torch.compile backend that finds every attention of a model and proves what it replaces.

Use it by name: `torch.compile(model, backend="sparse_compile")`. Importing this package imports
neither PyTorch nor Triton; the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_compile.backend import explain, last_report
    from sparse_compile.config import Config
    from sparse_compile.errors import (
        ConfigError,
        DeclinedSiteError,
        ModelError,
        OperatorError,
        SparseCompileError,
        TargetError,
        UnsupportedEnvironmentError,
        WeightsError,
    )
    from sparse_compile.inspect.report import Report, SiteReport

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "DeclinedSiteError",
    "ModelError",
    "OperatorError",
    "Report",
    "SiteReport",
    "SparseCompileError",
    "TargetError",
    "UnsupportedEnvironmentError",
    "WeightsError",
    "__version__",
    "explain",
    "last_report",
]

_HOME = {
    "Config": "sparse_compile.config",
    "Report": "sparse_compile.inspect.report",
    "SiteReport": "sparse_compile.inspect.report",
    "explain": "sparse_compile.backend",
    "last_report": "sparse_compile.backend",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME.get(name, "sparse_compile.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Every public name, loaded or not."""
    return sorted({*globals(), *__all__})
