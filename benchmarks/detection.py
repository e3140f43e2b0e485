"""How many attention sites we find and replace over the whole zoo, beside Inductor's own number.

    python benchmarks/detection.py                     # everything, one process at a time
    python benchmarks/detection.py --jobs 2 --package timm --package diffusers --inductor 1
    python benchmarks/detection.py --match llama --fresh

Sites are counted in eager mode; "in graphs" leaves out what a graph break tears apart, dead code, and
models tagged `negative` or `ambiguous` (attention over channels, say). What "must stay" are sites
whose weights a graph returns, or mixes over heads before the values, or changes by what no formula
of one score says (models tagged `declinable`). The share is that of the sites in graphs that need
not stay. Inductor's number is of the explicit softmaxes of every Nth model that runs; it is the
slow part.

Every model runs in a process of its own with a time limit. Results are appended as they come, so
an interrupted sweep goes on where it stopped; the table and the JSON are made from them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PRELOAD = ["torch", "torch._dynamo", "sympy", "networkx", "benchmarks.zoo.warm"]
COLUMNS = (
    ("package", "package"), ("models", "models"), ("failed", "not run"), ("true", "sites"),
    ("live", "in graphs"), ("forced", "must stay"), ("found", "found"), ("rewritten", "rewritten"), ("share", "%"), ("declined", "declined"), ("missed", "missed"),
    ("false", "false pos."), ("wrong", "wrong"), ("breaks", "breaks"), ("inductor", "inductor"), ("inductor_of", "of"),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the sweep and print its table; 1 if an output is wrong or a site is a false positive."""
    options = _arguments().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from benchmarks.zoo import families

    ids = [entry.id for entry in families.entries(options.package, options.match)]
    lines = options.output.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        lines.unlink(missing_ok=True)
    done = {record["id"]: record for record in _read(lines)}
    todo = [entry_id for entry_id in ids if entry_id not in done]
    with lines.open("a") as sink:
        for record in _sweep(todo, options):
            done[record["id"]] = record
            sink.write(json.dumps(record) + "\n")
            sink.flush()
    records = [done[entry_id] for entry_id in ids if entry_id in done]
    summary = summarise(records)
    _write(options.output, summary, records)
    print(table(summary))
    print(reasons(records))
    return int(any(record["wrong"] or record["false_positives"] for record in records))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--package", action="append", default=[], help="only this package")
    parser.add_argument("--match", default="", help="only entries whose id contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds a model")
    parser.add_argument("--train", action="store_true", help="compare gradients where tagged")
    parser.add_argument("--inductor", type=int, default=0, metavar="N",
                        help="count Inductor's fusions too, in every Nth model")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--output", type=Path, default=RESULTS / "detection.json")
    return parser


def _write(output: Path, summary: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Where and what was measured, the summary, and a line for each model."""
    from benchmarks import common

    head = json.dumps({**common.environment("cpu"), "summary": summary}, indent=1)
    lines = ",\n".join(f"  {_shared(json.dumps(_short(record)))}" for record in records)
    output.write_text(f'{head.removesuffix("}").rstrip()},\n "models": [\n{lines}\n ]\n}}\n')


def _short(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "graph_breaks": len(record["graph_breaks"])}


def _shared(text: str) -> str:
    """A text without the folders of this machine."""
    return re.sub(r"/[^ ()\"]*/site-packages/", "", text).replace(f"{ROOT}/", "")


def _read(lines: Path) -> list[dict[str, Any]]:
    if not lines.exists():
        return []
    return [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]


def _sweep(ids: list[str], options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Results in the order in which they are ready."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    running: dict[Connection, tuple[str, Any, float]] = {}
    waiting = list(reversed(ids))
    count, began = 0, time.monotonic()
    while waiting or running:
        while waiting and len(running) < options.jobs:
            entry_id = waiting.pop()
            ours, theirs = context.Pipe()
            fusions = (
                bool(options.inductor) and zlib.crc32(entry_id.encode()) % options.inductor == 0
            )
            process = context.Process(
                target=_work, args=(entry_id, theirs, options.train, fusions), daemon=True
            )
            process.start()
            theirs.close()
            running[ours] = (entry_id, process, time.monotonic())
        for pipe in [*wait(list(running), timeout=0.5), *_late(running, options.timeout)]:
            if pipe not in running:
                continue
            entry_id, process, start = running.pop(pipe)
            record = _collect(pipe, entry_id, time.monotonic() - start)
            process.join(timeout=2.0)
            process.kill()
            process.join()
            count += 1
            _progress(record, count, len(ids), began)
            yield record


def _late(running: dict[Connection, tuple[str, Any, float]], timeout: float) -> list[Connection]:
    now = time.monotonic()
    return [pipe for pipe, (_, _, start) in running.items() if now - start > timeout]


def _collect(pipe: Connection, entry_id: str, seconds: float) -> dict[str, Any]:
    try:
        record = pipe.recv() if pipe.poll() else None
    except (EOFError, OSError):
        record = None
    if record is None:
        record = _lost(entry_id, f"no answer after {seconds:.0f} s")
    record["seconds"] = round(seconds, 1)
    return record


def _lost(entry_id: str, message: str) -> dict[str, Any]:
    from benchmarks.zoo.check import Outcome

    package, _, name = entry_id.partition("-")
    return {"id": entry_id, **Outcome(name, package, error=message).to_builtins()}


def _work(entry_id: str, pipe: Connection, train: bool, inductor: bool) -> None:
    """One model, in its own process."""
    sys.path.insert(0, str(ROOT))
    import warnings

    import torch

    from benchmarks.zoo import families
    from benchmarks.zoo.check import check, inductor_fusions

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    entry = families.find(entry_id)
    outcome = check(entry, train=train and entry.has("train"))
    record = {"id": entry_id, **outcome.to_builtins()}
    if inductor and not outcome.error:
        record["inductor"] = inductor_fusions(entry)
    pipe.send(record)
    pipe.close()


def _progress(record: dict[str, Any], count: int, total: int, began: float) -> None:
    left = (time.monotonic() - began) / count * (total - count)
    state = record["error"][:60] or f"{record['rewritten']}/{record['true_sites']}"
    flag = " WRONG" if record["wrong"] else ""
    text = f"[{count}/{total}, {left / 60:.0f} min left] {record['id']}: {state}{flag}"
    print(text, file=sys.stderr, flush=True)


def summarise(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Counts by package, and `total`."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["package"]].append(record)
    summary = {package: _counts(group) for package, group in sorted(groups.items())}
    return {**summary, "total": _counts(records)}


def _counts(records: list[dict[str, Any]]) -> dict[str, Any]:
    from benchmarks.zoo.check import Outcome

    ran = [record for record in records if not record["error"]]
    declined: Counter[str] = Counter()
    for record in ran:
        declined.update(record["declined"])
    outcomes = [Outcome.from_builtins(record) for record in ran]
    clear = [outcome for outcome in outcomes if not {"negative", "ambiguous"} & set(outcome.tags)]
    live = sum(outcome.live_sites for outcome in clear)
    right = sum(min(outcome.rewritten, outcome.true_sites) for outcome in clear)
    forced = sum(outcome.forced for outcome in clear)
    counted = [record for record in ran if record.get("inductor") is not None]
    return {
        "models": len(records),
        "failed": len(records) - len(ran),
        "true": sum(record["true_sites"] for record in ran),
        "live": live,
        "found": sum(record["found"] for record in ran),
        "rewritten": right,
        "forced": forced,
        "share": round(100 * right / (live - forced), 1) if live > forced else None,
        "declined": sum(declined.values()),
        "declined_by_reason": dict(declined.most_common()),
        "missed": sum(outcome.missed for outcome in clear),
        "false": sum(record["false_positives"] for record in ran),
        "wrong": sum(record["wrong"] for record in ran),
        "breaks": sum(len(record["graph_breaks"]) for record in ran),
        "inductor": sum(record["inductor"] for record in counted) if counted else None,
        "inductor_of": sum(record["explicit_sites"] for record in counted) if counted else None,
    }


def table(summary: dict[str, dict[str, Any]]) -> str:
    """One row a package."""
    rows = [[title for _, title in COLUMNS]]
    for package, counts in summary.items():
        values = {"package": package, **counts}
        rows.append(["" if values[key] is None else str(values[key]) for key, _ in COLUMNS])
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def reasons(records: list[dict[str, Any]]) -> str:
    """Declined sites by reason code, and the models with most of each."""
    by_code: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for code, count in record["declined"].items():
            by_code[code][record["id"]] += count
    lines = ["", "declined by reason"]
    for code, models in sorted(by_code.items(), key=lambda item: -sum(item[1].values())):
        names = ", ".join(name for name, _ in models.most_common(4))
        lines.append(f"  {sum(models.values()):5d}  {code}  in {len(models)} models: {names}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
