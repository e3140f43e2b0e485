"""The command `sparse-compile`. A subcommand's module is imported when it is called."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from sparse_compile import __version__
from sparse_compile.errors import SparseCompileError

PROGRAM = "sparse-compile"
COMMANDS = {  # name -> where it lives, what it does
    "demo": (
        "sparse_compile.cli.demo:demo",
        "Continue a text with a small language model: eager and compiled, side by side.",
    ),
    "doctor": (
        "sparse_compile.cli.doctor:doctor",
        "Check this machine: versions, GPU, compiler, and what will and won't work.",
    ),
    "inspect": (
        "sparse_compile.cli.inspect:inspect",
        "Show every attention found in a model, its proof, its plan and the reason.",
    ),
    "tune": (
        "sparse_compile.cli.tune:tune",
        "Find the best tiles of every kernel on this machine.",
    ),
}


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help text."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command that was called."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        return getattr(importlib.import_module(module), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help text's list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Show the log on stderr.")
@click.version_option(__version__, prog_name=PROGRAM)
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """Find every attention of a PyTorch model, prove what it computes, replace it.

    Results go to stdout, logs and progress to stderr. Exit code 0: done; 1: a problem was found;
    2: wrong usage.
    """
    if verbose:
        ctx.with_resource(_log_on_stderr())


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    logger = logging.getLogger("sparse_compile")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What follows the program's name; the process's own by default.
    """
    try:
        result = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name=PROGRAM,
            standalone_mode=False,
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo(f"{PROGRAM}: interrupted", err=True)
        return 1
    except SparseCompileError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        return 1
    return result if isinstance(result, int) else 0
