"""`sparse-compile doctor --measure`: what this GPU reaches, kept for the cost model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from sparse_compile import _support, rates
from sparse_compile.errors import RatesError

if TYPE_CHECKING:
    from sparse_compile.rates import Rates


def measure(as_json: bool, output: Path | None) -> None:
    """Measure the present GPU, keep the result and print it.

    Args:
        as_json: Print what is kept instead of a table.
        output: File to write instead of that of the user's cache.

    Raises:
        UnsupportedEnvironmentError: PyTorch sees no GPU.
        RatesError: The file cannot be written, or the GPU has too little free memory.
    """
    _support.check_gpu()
    import torch

    from sparse_compile.kernels import device_rates

    found = None
    try:
        for step, found in device_rates.measure(torch.device("cuda", torch.cuda.current_device())):
            if found is None:
                click.echo(f"{step} ...", err=True)
    except torch.OutOfMemoryError as error:
        raise RatesError(
            f"the GPU has too little free memory: {error}.\n"
            "  Expected 3 GiB.\n"
            "  End what else runs on it, which would falsify the measurement too."
        ) from error
    assert found is not None
    path = output or rates.cache_file(found.device)
    rates.write(found, path)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        print_rates(found)
    click.echo(f"written to {path}", err=True)


def print_rates(found: Rates) -> None:
    """A table of a device's rates on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.device}: {found.origin}", title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("reached", justify="right")
    for what, reached in rows(found):
        table.add_row(what, reached)
    Console().print(table)


def rows(found: Rates) -> list[tuple[str, str]]:
    """What was measured, and the number with its unit."""
    listed = [
        ("copy through memory, read and written", f"{found.copy_bytes_per_s / 1e12:.2f} TB/s")
    ]
    for what, levels in (
        ("tiles read again", found.reread_bytes_per_s),
        ("float32 additions", found.atomic_bytes_per_s),
    ):
        for size, speed in rates.pairs(levels):
            listed.append((f"{what} in {size / 2**20:.0f} MiB", f"{speed / 1e12:.2f} TB/s"))
    listed.append(
        ("tiles read by one program alone", f"{found.program_bytes_per_s / 1e9:.0f} GB/s")
    )
    for dtype, speed in found.flops_per_s.items():
        listed.append((f"matrix product, {dtype}", f"{speed / 1e12:.0f} TFLOP/s"))
    listed.append(("launch of a kernel", f"{found.launch_s * 1e6:.1f} us"))
    return listed
