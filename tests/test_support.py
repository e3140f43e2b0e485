"""Which PyTorch is refused, and with what message."""

import subprocess
import sys

import pytest

from sparse_compile._support import check_torch, release, version_text
from sparse_compile.errors import UnsupportedEnvironmentError


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.11", "2.13.0+cpu", "2.15.0.dev20261001", "3.0.0", "2.12.0a0+git1234"]
)
def test_supported(version):
    check_torch(version)
    assert release(version) >= (2, 11)


@pytest.mark.parametrize("version", ["2.10.1", "2.9.0+cu128", "1.13.1", "2.2.0", "unknown", ""])
def test_unsupported(version):
    with pytest.raises(UnsupportedEnvironmentError) as caught:
        check_torch(version)
    assert str(caught.value) == (
        f'backend "sparse_compile": the installed torch is {version}.\n'
        "  Expected torch 2.11 or newer.\n"
        "  Upgrade it, for example with: pip install 'torch>=2.11'"
    )


def test_release():
    assert release("5.10.4rc1") == (5, 10, 4)
    assert release("git") == ()
    assert version_text((5, 10, 4)) == "5.10.4"


def test_backend_name_with_unsupported_torch():
    """The message reaches a user who only names the backend."""
    code = (
        "import torch\n"
        "torch.__version__ = '2.9.1'\n"
        "torch.compile(torch.nn.Identity(), backend='sparse_compile')(torch.ones(1))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert "UnsupportedEnvironmentError" in done.stderr
    assert 'backend "sparse_compile": the installed torch is 2.9.1.' in done.stderr
    assert "pip install 'torch>=2.11'" in done.stderr
