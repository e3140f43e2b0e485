"""`sparse-compile inspect`: every attention of a model, its proof, its plan and the reason."""

from __future__ import annotations

import sys
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_compile.errors import (
    ConfigError,
    ModelError,
    SparseCompileError,
    TargetError,
)

if TYPE_CHECKING:
    from sparse_compile.config import Config
    from sparse_compile.inspect.report import Report
    from sparse_compile.inspect.targets import Target

_SUFFIXES = (".html", ".json", ".txt")
_DONE, _PROBLEM, _WRONG_USAGE = 0, 1, 2


@click.command()
@click.argument("target", metavar="TARGET")
@click.option("--policy", help="What may be given up: exact, top_p, top_k or native.")
@click.option("--config", "config_file", metavar="FILE", help="Options from a TOML file.")
@click.option("--verify", is_flag=True, help="Compare every site with the model's own computation.")
@click.option("--strict", is_flag=True, help="Exit with 1 if a site was declined.")
@click.option("--training", is_flag=True, help="Inspect in training mode, with gradients.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to run the model.")
@click.option("--expand", is_flag=True, help="Show identical layers one by one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a file: .html, .json or .txt.",
)
def inspect(
    target: str,
    policy: str | None,
    config_file: str | None,
    verify: bool,
    strict: bool,
    training: bool,
    device: str | None,
    expand: bool,
    as_json: bool,
    output: Path | None,
) -> int:
    """Show every attention found in a model, its proof, its plan and the reason.

    TARGET is `module:callable` or `file.py:callable`, which returns (model, args, kwargs), or a
    local Hugging Face model directory or config.json (random weights).

    Exit code 0: done; 1: a verification failed, the model fails by itself, or with --strict a site
    was declined; 2: wrong usage.
    """
    _check_output(output)
    try:
        config = _config(policy, config_file, verify)
        strict = strict or config.strict
        loaded = _load(target, device, training)
        report = _explain(loaded, config, training)
    except (ConfigError, TargetError) as error:
        _complain(error)
        return _WRONG_USAGE
    except ModelError as error:
        _complain(error)
        return _PROBLEM
    if output:
        _write(report, output, loaded.description, expand)
    _show(report, as_json=as_json, expand=expand)
    broken = bool(report.declined or report.errors)
    return _PROBLEM if report.failed_validations or (strict and broken) else _DONE


def _check_output(output: Path | None) -> None:
    """Refuse a file that could not be written, before the work is done."""
    if output is None:
        return
    if output.suffix not in _SUFFIXES:
        raise click.BadParameter(
            f"{str(output)!r} ends in {output.suffix or 'nothing'!r}. "
            f"Expected {', '.join(_SUFFIXES)}.",
            param_hint="--output",
        )
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(
            f"There is no folder {str(output.absolute().parent)!r}.", param_hint="--output"
        )


def _config(policy: str | None, config_file: str | None, verify: bool) -> Config:
    """The file's options (or the environment's), with those of the command line on top."""
    from sparse_compile.config import Config

    options: dict[str, Any] = {}
    if policy:
        options["policy"] = policy
    if verify:
        options["verify"] = True
    if config_file is None:
        return Config.from_options(options)
    given = Config.from_toml(config_file).to_options()
    return Config.from_options(Config(**(given | options)))


def _load(target: str, device: str | None, training: bool) -> Target:
    from sparse_compile import _support
    from sparse_compile.inspect.targets import load_target

    if device == "cuda":
        _support.check_gpu()
    click.echo(f"loading {target}", err=True)
    loaded = load_target(target)
    loaded.model.train(training)
    if device is None:
        return loaded
    args, kwargs = (_moved(value, device) for value in (loaded.args, loaded.kwargs))
    return type(loaded)(
        model=loaded.model.to(device), args=args, kwargs=kwargs, description=loaded.description
    )


def _moved(value: Any, device: str) -> Any:
    """Tensors inside tuples, lists and dicts, on another device."""
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(part, device) for part in value)
    return value.to(device) if hasattr(value, "to") else value


def _explain(loaded: Target, config: Config, training: bool) -> Report:
    """Run the stages; a failure of the model itself is told from one of ours by eager PyTorch."""
    import msgspec

    from sparse_compile import backend

    click.echo(f"inspecting {type(loaded.model).__name__}", err=True)
    # the exit code says it; raising would hide the other sites
    config = msgspec.structs.replace(config, strict=False)
    try:
        with _gradients(training):
            return backend.explain(loaded.model, *loaded.args, config=config, **loaded.kwargs)
    except SparseCompileError:
        raise
    except Exception:
        _check_eager(loaded, training)
        raise


def _check_eager(loaded: Target, training: bool) -> None:
    """Run the model as it is.

    Raises:
        ModelError: It fails.
    """
    try:
        with _gradients(training):
            loaded.model(*loaded.args, **loaded.kwargs)
    except Exception as error:
        raise ModelError(
            f"{loaded.description} fails by itself, without sparse_compile: "
            f"{type(error).__name__}: {error}.\n"
            "  Expected a model that runs in eager PyTorch with the given inputs; the traceback is "
            "above."
        ) from error


def _gradients(training: bool) -> AbstractContextManager[Any]:
    import torch

    return torch.set_grad_enabled(training)


def _write(report: Report, output: Path, title: str, expand: bool) -> None:
    from sparse_compile.inspect import report as reports
    from sparse_compile.inspect import text

    if output.suffix == ".html":
        report.to_html(output, title=title)
    elif output.suffix == ".json":
        reports.write_atomically(output, report.to_json())
    else:
        reports.write_atomically(output, text.render(report, width=text.WIDE, expand=expand))
    click.echo(f"wrote {output}", err=True)


def _show(report: Report, *, as_json: bool, expand: bool) -> None:
    """The result on stdout: JSON, or a table as wide as the terminal."""
    from sparse_compile.inspect import text

    if as_json:
        click.echo(report.to_json(), nl=False)
    elif sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        for part in text.renderables(report, width=console.width, expand=expand):
            console.print(part)
    else:
        click.echo(text.render(report, expand=expand), nl=False)


def _complain(error: SparseCompileError) -> None:
    """The error on stderr, below the traceback of what caused it in the user's code."""
    if error.__cause__ is not None:
        click.echo("".join(traceback.format_exception(error.__cause__)), err=True)
    click.echo(f"{type(error).__name__}: {error}", err=True)
