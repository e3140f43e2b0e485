"""What every test gets: one seed, a fresh Dynamo, none of the user's settings."""

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.quick_interpreter import prepare_once_a_launch

SEED = 0


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, Triton interprets the kernels; it decides so when they are imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        prepare_once_a_launch()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine that has none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_COMPILE_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Compiled code, reports and the recompilation limit do not outlive a test."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if "sparse_compile.backend" in sys.modules:
        # Dynamo resets the backends that it knows; a test may have wrapped ours
        sys.modules["sparse_compile.backend"].sparse_compile.reset()


@pytest.fixture
def much_memory() -> Iterator[None]:
    """One process at a time, for a test that takes tens of gigabytes of a GPU."""
    import torch
    from filelock import FileLock  # PyTorch needs it too

    with FileLock(Path(tempfile.gettempdir()) / "sparse_compile_much_memory.lock"):
        yield
        torch.cuda.empty_cache()
