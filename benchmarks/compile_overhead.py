"""What our passes add to torch.compile's own time, for a Llama-shaped model of 32 narrow layers.

    python -m benchmarks.compile_overhead              # a quarter of an hour on two cores
    python -m benchmarks.compile_overhead --layers 2 --no-codegen

Every compilation runs in a process of its own with Inductor's caches off. The share is the time
spent in our passes over the total that Inductor alone needs; the goal is one tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks import common
from benchmarks.models import Sizes

NAME = "compile_overhead.json"
GOAL = 0.10
TOKENS = 64


def compile_once(layers: int, backend_name: str, device: str, codegen: bool) -> common.Record:
    """Compile the model once, in this process.

    Returns:
        Seconds on the clock and of the processor (both with the first run), and for ours the time
        of each pass.
    """
    import torch

    from benchmarks import models
    from sparse_compile import backend

    sizes = Sizes(
        layers=layers, hidden=64, intermediate=128, query_heads=4, kv_heads=2, head_dim=16
    )
    model = models.build(models.causal(sizes), device=device, seed=0)
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    ours = backend.sparse_compile if codegen else backend.rewrite_only
    others = "inductor" if codegen else "aot_eager"
    chosen = ours if backend_name == "sparse_compile" else others
    # What both load the first time is no part of either's time.
    torch.compile(torch.nn.Linear(4, 4, device=device), backend=chosen)(ids.new_ones(2, 4) * 1.0)
    torch._dynamo.reset()

    compiled = torch.compile(model, backend=chosen, dynamic=False)
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
    found: common.Record = {
        "backend": backend_name,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }
    if backend_name == "sparse_compile":
        graphs = backend.last_report().graphs
        passes: dict[str, float] = {}
        for graph in graphs:
            for timing in graph.timings:
                passes[timing.name] = passes.get(timing.name, 0.0) + timing.ms
        found |= {
            "passes_ms": passes,
            "passes_s": sum(passes.values()) / 1e3,
            "sites": sum(len(graph.sites) for graph in graphs),
            "rewritten": sum(s.status == "rewritten" for g in graphs for s in g.sites),
        }
    return found


def in_own_process(options: argparse.Namespace, backend_name: str) -> common.Record:
    """`compile_once` in a fresh process, without Inductor's caches."""
    command = [sys.executable, "-m", "benchmarks.compile_overhead", "--once", backend_name]
    command += ["--layers", str(options.layers), "--device", options.device]
    command += [] if options.codegen else ["--no-codegen"]
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_CACHE_DIR": folder}
        done = subprocess.run(
            command,
            cwd=common.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, **caches},
        )
    return json.loads(done.stdout.splitlines()[-1])


def summary(records: Sequence[common.Record]) -> common.Record:
    """Medians over the runs, and the share of our passes."""

    def median(backend_name: str, key: str) -> float:
        return statistics.median(r[key] for r in records if r["backend"] == backend_name)

    inductor, ours = median("inductor", "wall_s"), median("sparse_compile", "wall_s")
    passes = median("sparse_compile", "passes_s")
    return {
        "inductor_wall_s": inductor,
        "sparse_compile_wall_s": ours,
        "passes_s": passes,
        "passes_share": passes / inductor,
        "total_ratio": ours / inductor,
        "goal": GOAL,
    }


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = common.parser("Time that our passes add to torch.compile's own.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--no-codegen", dest="codegen", action="store_false", help="capture and rewrite only"
    )
    parser.add_argument("--once", choices=["inductor", "sparse_compile"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; returns 1 if the goal is missed."""
    options = options_of(arguments)
    if options.once:
        found = compile_once(options.layers, options.once, options.device, options.codegen)
        print(json.dumps(found))
        return 0
    about = {"layers": options.layers, "tokens": TOKENS, "codegen": options.codegen}
    where = common.environment(options.device)
    records = []
    for repeat in range(options.repeats):
        for name in ("inductor", "sparse_compile"):  # in turn: a busy machine hits both
            found = in_own_process(options, name)
            print(f"{name} {repeat}: {found['wall_s']:.1f} s", file=sys.stderr)
            records.append({"record": "run", "repeat": repeat, **about, **found, **where})
    total = summary(records)
    common.write_json(
        NAME, [*records, {"record": "summary", **about, **total, **where}], options.output
    )
    common.print_table(
        f"{options.layers} layers, seconds",
        ("torch.compile", "sparse_compile", "our passes", "share", "goal"),
        [
            [
                *(total[k] for k in ("inductor_wall_s", "sparse_compile_wall_s", "passes_s")),
                f"{total['passes_share']:.1%}",
                f"{GOAL:.0%}",
            ]
        ],
    )
    return 0 if total["passes_share"] <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
