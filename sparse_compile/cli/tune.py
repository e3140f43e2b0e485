"""`sparse-compile tune`: find the best tiles of every kernel on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_compile.errors import ConfigError, TargetError, UnsupportedEnvironmentError

if TYPE_CHECKING:
    from sparse_compile.tuner.overview import Overview
    from sparse_compile.tuner.plan import Plan
    from sparse_compile.tuner.search import Job, Outcome, Tuner

_DONE, _PROBLEM, _WRONG_USAGE = 0, 1, 2
VERSION = 1  # of the JSON


@click.command()
@click.option("--kernel", "kernels", multiple=True, metavar="NAME", help="Tune only this one.")
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="What to tune, from a TOML file.",
)  # fmt: skip
@click.option(
    "--shapes", metavar="WHICH", help="list (built in), or from:MODEL, as `inspect` takes it."
)
@click.option(
    "--dtype", "dtypes", multiple=True, metavar="NAME", help="float16, bfloat16 or float32."
)
@click.option("--budget", metavar="TIME", help="Begin nothing after this time, as 5m.")
@click.option("--again", is_flag=True, help="Tune what has a result already.")
@click.option("--workers", type=click.IntRange(1), help="Processes that compile.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
    help="Write results here, not into the user's cache; kernels/tables ships them.",
)  # fmt: skip
@click.option("--check", is_flag=True, help="Only validate all tables; needs no GPU.")
@click.option("--show", is_flag=True, help="Only show what is in force, and from where.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def tune(
    kernels: tuple[str, ...],
    config: Path | None,
    shapes: str | None,
    dtypes: tuple[str, ...],
    budget: str | None,
    again: bool,
    workers: int | None,
    output: Path | None,
    check: bool,
    show: bool,
    as_json: bool,
) -> int:
    """Find the best tiles of every kernel on this machine.

    Candidates are compiled, compared with the reference and timed; the winners go to the user's
    cache, where all later processes find them. What has a result is not tuned again, so a run that
    was interrupted goes on where it was.

    Exit code 0: done; 1: a table is wrong, a kernel failed or the run was interrupted; 2: wrong
    usage.
    """
    if check or show:
        return _survey(kernels, show=show, as_json=as_json)
    try:
        tuner, plan, jobs = _prepared(kernels, config, shapes, dtypes, budget, again, output)
    except (ConfigError, TargetError) as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        return _WRONG_USAGE
    outcomes, end = _run(tuner, jobs, plan, workers)
    _report(tuner, outcomes, jobs, end, as_json)
    failed = any(outcome.status == "failed" for outcome in outcomes)
    return _PROBLEM if failed or end == "interrupted" else _DONE


def _prepared(
    kernels: tuple[str, ...], config: Path | None, shapes: str | None, dtypes: tuple[str, ...],
    budget: str | None, again: bool, output: Path | None,
) -> tuple[Tuner, Plan, list[Job]]:  # fmt: skip
    from sparse_compile.kernels import timing, tuning_results
    from sparse_compile.tuner import plan as plans
    from sparse_compile.tuner import search

    device = timing.device()
    if device is None:
        raise UnsupportedEnvironmentError(
            "tuning times kernels on a GPU, and PyTorch sees none.\n"
            "  Expected a CUDA device that torch.cuda.is_available() reports.\n"
            "  `tune --check` and `tune --show` need none; TRITON_INTERPRET=1 lets kernels run "
            "here, slowly, to try the command."
        )
    plan = plans.read(
        config, kernels=kernels, dtypes=dtypes, budget=budget, shapes=shapes,
        interpreted=device.type != "cuda",
    )  # fmt: skip
    folder = output or tuning_results.user_folder()
    tuner = search.Tuner(device, folder, spaces=plan.spaces, again=again)
    return tuner, plan, search.jobs(plan.kernels, plan.problems)


def _run(
    tuner: Tuner, jobs: Sequence[Job], plan: Plan, workers: int | None
) -> tuple[list[Outcome], str]:
    """The outcomes, and how the run ended: done, out of budget, or interrupted."""
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + plan.budget_s
    with _progress(len(jobs)) as advance:
        try:
            for outcome in tuner.run(jobs, deadline=deadline, workers=workers):
                outcomes.append(outcome)
                advance(outcome)
        except KeyboardInterrupt:
            return outcomes, "interrupted"
    return outcomes, "done" if len(outcomes) == len(jobs) else "out of budget"


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar with rate and end estimate on stderr, or a line for each job where it is no terminal."""
    if not sys.stderr.isatty():

        def say(outcome: Outcome) -> None:
            click.echo(str(outcome), err=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("tuning"), BarColumn(), MofNCompleteColumn(), Elapsed(), Remaining())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def advance(outcome: Outcome) -> None:
            bar.console.print(str(outcome), markup=False, highlight=False)
            bar.advance(task)

        yield advance


def _report(
    tuner: Tuner, outcomes: list[Outcome], jobs: Sequence[Job], end: str, as_json: bool
) -> None:
    if as_json:
        _print_json(
            {
                "version": VERSION, "device": tuner.device_name, "folder": str(tuner.folder),
                "end": end, "jobs": len(jobs), "outcomes": outcomes,
            }
        )  # fmt: skip
        return
    count = {status: sum(one.status == status for one in outcomes)
             for status in ("tuned", "kept", "failed")}  # fmt: skip
    better = [one.default_ms / one.ms for one in outcomes if one.status == "tuned" and one.ms]
    for outcome in outcomes:
        for dropped in outcome.dropped:
            if dropped.why in ("wrong", "fails"):
                click.echo(f"dropped, {dropped.why}: {outcome.job} {dropped.values}: "
                           f"{dropped.detail.splitlines()[0]}")  # fmt: skip
    click.echo(
        f"{end}: {count['tuned']} tuned, {count['kept']} kept, {count['failed']} failed of "
        f"{len(jobs)}; results in {tuner.folder}"
    )
    if better:
        gain = sorted(better)[len(better) // 2]
        click.echo(f"median gain over the defaults: {gain:.2f} times")


def _survey(kernels: tuple[str, ...], *, show: bool, as_json: bool) -> int:
    from sparse_compile.tuner import overview

    found = overview.survey()
    if as_json:
        report: dict[str, Any] = {"version": VERSION, "right": found.is_right,
                                  "findings": found.findings}  # fmt: skip
        if show:
            report["rows"] = [row for row in found.rows if not kernels or row.kernel in kernels]
        _print_json(report)
    else:
        if show:
            _print_rows(found, kernels)
        for finding in found.findings:
            click.echo(str(finding), err=show)
        if not show:
            state = "right" if found.is_right else "wrong"
            click.echo(f"{len(found.kernels)} tables: {state}")
    return _DONE if show or found.is_right else _PROBLEM


def _print_rows(found: Overview, kernels: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Tuned values in force; defaults hold for all other keys")
    for column in ("kernel", "device", "for", "values", "from", "ms (default)"):
        table.add_column(column, overflow="fold")
    for row in found.rows:
        if not kernels or row.kernel in kernels:
            facts = " ".join(f"{name}={value}" for name, value in row.key.items())
            values = " ".join(f"{name}={value}" for name, value in row.values.items())
            values = values or "as the kernel computes them"
            times = "" if row.ms is None else f"{row.ms:.4g} ({row.default_ms:.4g})"
            what = f"{row.dtype} {facts}"
            table.add_row(row.kernel, row.device, what, values, row.source, times)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _print_json(value: object) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())
