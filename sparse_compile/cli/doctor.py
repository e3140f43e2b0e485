"""`sparse-compile doctor`: what this machine has, and what will and won't work on it."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

import click
import msgspec

from sparse_compile import __version__, _support, settings
from sparse_compile._support import release, version_text
from sparse_compile.config import Config
from sparse_compile.errors import SparseCompileError, UnsupportedEnvironmentError

Status = Literal["ok", "warn", "fail"]
BACKEND = "sparse_compile"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report."""

    name: str
    status: Status  # "fail": the backend cannot work here
    found: str
    effect: str  # what will or won't work

    def __str__(self) -> str:
        return f"{self.status} {self.name}: {self.found}. {self.effect}"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--require-gpu", is_flag=True, help="Fail when PyTorch sees no GPU.")
@click.option(
    "--measure", "measures", is_flag=True,
    help="Measure the GPU instead, in less than half a minute, and keep the rates for the planner.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="With --measure: write the rates to FILE instead of the user's cache.",
)  # fmt: skip
@click.pass_context
def doctor(
    ctx: click.Context, as_json: bool, require_gpu: bool, measures: bool, output: Path | None
) -> None:
    """Check this machine: versions, GPU, compiler, and what will and won't work.

    Exit code 0: the backend works here; 1: it does not.
    """
    if measures:
        from sparse_compile.cli.measure import measure

        measure(as_json, output)
        return
    if output is not None:
        raise click.UsageError("--output FILE goes with --measure.")
    findings = examine()
    works = all(finding.status != "fail" for finding in findings)
    if as_json:
        report = {"version": 1, "sparse_compile": __version__, "works": works, "checks": findings}
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        _print_table(findings, works)
    torch_works = any(f.name == "torch" and f.status != "fail" for f in findings)
    if require_gpu and torch_works:
        _support.check_gpu()
    ctx.exit(0 if works else 1)


def examine() -> list[Finding]:
    """Every check of this machine, in the order of the report."""
    findings = [_python(), _torch(), _triton(), _transformers()]
    if findings[1].status != "fail":
        findings += [_gpu(), _compiler(), _backend_name()]
    findings += _settings()
    if findings[1].status != "fail" and all(f.name != "environment" for f in findings):
        findings.append(_rates())
    return findings


def _python() -> Finding:
    return Finding(
        name="python",
        status="ok" if platform.system() == "Linux" else "warn",
        found=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        effect="Supported: Python 3.10 or newer on Linux",
    )


def _torch() -> Finding:
    need = version_text(_support.MINIMUM_TORCH)
    tested = version_text(_support.NEWEST_TESTED_TORCH)
    try:
        import torch
    except Exception as error:  # whatever a broken installation or an odd TORCH_* variable raises
        return Finding(
            name="torch",
            status="fail",
            found=f"import torch fails with {type(error).__name__}: {error}",
            effect="Nothing works before this is repaired; an empty TORCH_LOGS is one cause",
        )
    version = str(torch.__version__)
    try:
        _support.check_torch(version)
    except UnsupportedEnvironmentError:
        effect = f"The backend needs torch {need} or newer: pip install 'torch>={need}'"
        return Finding(name="torch", status="fail", found=version, effect=effect)
    if release(version)[:2] > _support.NEWEST_TESTED_TORCH:
        effect = f"Newer than {tested}, the newest tested; expected to work"
        return Finding(name="torch", status="warn", found=version, effect=effect)
    effect = f"Supported: {need} or newer, tested up to {tested}"
    return Finding(name="torch", status="ok", found=version, effect=effect)


def _triton() -> Finding:
    lost = "Triton kernels do not run; sites are lowered to PyTorch's own kernels"
    fine = "Triton kernels can run on a GPU"
    return _package("triton", _support.MINIMUM_TRITON, fine, lost)


def _transformers() -> Finding:
    lost = "The demo and Hugging Face model folders do not work: pip install 'sparse-compile[hf]'"
    fine = "The demo and Hugging Face model folders work"
    return _package("transformers", _support.MINIMUM_TRANSFORMERS, fine, lost)


def _package(name: str, minimum: tuple[int, ...], fine: str, lost: str) -> Finding:
    need = version_text(minimum)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name=name, status="warn", found="not installed", effect=lost)
    if release(version) < minimum:
        effect = f"Needs {need} or newer. {lost}"
        return Finding(name=name, status="warn", found=version, effect=effect)
    return Finding(name=name, status="ok", found=version, effect=f"{fine}; needs {need} or newer")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        found = (
            f"none seen (torch is built for {build})" if build else "none (a CPU build of torch)"
        )
        effect = "Models compile for the CPU; detection, proofs and reports work; no Triton kernel"
        return Finding(name="gpu", status="warn", found=found, effect=effect)
    device = torch.cuda.get_device_properties(0)
    found = (
        f"{torch.cuda.device_count()} x {device.name}, capability {device.major}.{device.minor}, "
        f"{device.total_memory / 2**30:.0f} GiB"
    )
    if torch.version.hip or device.major < 8:
        effect = "Not tested: kernels are tested on NVIDIA GPUs of capability 8.0 or newer"
        return Finding(name="gpu", status="warn", found=found, effect=effect)
    return Finding(name="gpu", status="ok", found=found, effect="Triton kernels run here")


def _compiler() -> Finding:
    from sparse_compile import _compat

    compiler = _compat.cpp_compiler()
    if compiler is None:
        effect = "torch.compile cannot build code for the CPU or launch Triton: install g++"
        return Finding(name="compiler", status="fail", found="no C++ compiler", effect=effect)
    effect = "Inductor can build code for the CPU"
    return Finding(name="compiler", status="ok", found=compiler, effect=effect)


def _backend_name() -> Finding:
    from sparse_compile import _compat

    name = "backend name"
    if BACKEND not in _compat.backend_names():
        effect = f'torch.compile(backend="{BACKEND}") fails: install this package with pip'
        return Finding(name=name, status="fail", found="not registered", effect=effect)
    try:
        _compat.load_backend(BACKEND)
    except Exception as error:  # the reason may be anything that the import meets
        found = f"registered, but loading it fails with {type(error).__name__}: {error}"
        effect = f'torch.compile(backend="{BACKEND}") fails'
        return Finding(name=name, status="fail", found=found, effect=effect)
    effect = f'torch.compile(model, backend="{BACKEND}") works'
    return Finding(name=name, status="ok", found="registered", effect=effect)


def _settings() -> Iterator[Finding]:
    try:
        found = settings.read()
    except SparseCompileError as error:
        effect = "Nothing compiles before the variable is corrected"
        yield Finding(name="environment", status="fail", found=str(error), effect=effect)
        return
    yield _cache_dir(found)
    yield _options(found)


def _cache_dir(found: settings.Settings) -> Finding:
    path = found.cache_dir
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        effect = (
            f"Converted weights cannot be kept: set {settings.CACHE_VARIABLE} to another folder"
        )
        text = f"{path} cannot be written ({error.strerror})"
        return Finding(name="cache folder", status="warn", found=text, effect=effect)
    effect = "Converted weights are kept here"
    return Finding(name="cache folder", status="ok", found=str(path), effect=effect)


def _options(found: settings.Settings) -> Finding:
    try:
        config = Config.from_options()
    except SparseCompileError as error:
        effect = "Nothing compiles before the file is corrected"
        return Finding(name="options", status="fail", found=str(error), effect=effect)
    origin = str(found.config_file or "built in")
    options = ", ".join(f"{name}={value!r}" for name, value in config.to_options().items())
    effect = f"In force where torch.compile gives none: {options}"
    return Finding(name="options", status="ok", found=origin, effect=effect)


def _rates() -> Finding:
    import torch

    from sparse_compile import rates

    has_gpu = torch.cuda.is_available()
    known = rates.lookup(torch.cuda.get_device_name() if has_gpu else "cpu")
    effect = "The planner predicts times with these"
    if known.note and has_gpu:
        effect += "; sparse-compile doctor --measure measures this device in half a minute"
    return Finding(
        name="rates",
        status="warn" if known.note and has_gpu else "ok",
        found=known.note or f"{known.rates.device}: {known.rates.origin}",
        effect=effect,
    )


def _print_table(findings: list[Finding], works: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"sparse_compile {__version__}", title_justify="left")
    for column in ("", "what", "found", "what it means"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in findings:
        status = Text(finding.status, style=colours[finding.status])
        table.add_row(status, finding.name, Text(finding.found), Text(finding.effect))
    console = Console()
    console.print(table)
    console.print("The backend works here." if works else "The backend does not work here.")
