"""What the programs about sparse attention share: options, the run, tables."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import common, floors, peers
from benchmarks.attention_runs import DeviceLostError, Setting
from sparse_compile._support import check_gpu
from sparse_compile.errors import SparseCompileError

if TYPE_CHECKING:
    from benchmarks.common import Record

Measure = Callable[[Sequence[floors.Shape], Setting, Sequence[peers.Peer]], Iterator["Record"]]


def parser(description: str, tokens: Sequence[int]) -> argparse.ArgumentParser:
    """The options that the programs share, with the lengths that one measures by default."""
    made = common.parser(description)
    made.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    made.add_argument("--tokens", nargs="+", type=int, default=list(tokens))
    made.add_argument("--groups", nargs="+", type=int, default=[16, 4, 1])
    made.add_argument("--calls", type=int, default=12, help="timed calls of each measurement")
    made.add_argument("--peers", type=Path, metavar="DIR", help="folder of others' checkouts")
    made.add_argument("--no-peers", action="store_true", help="leave --peers aside")
    return made


def setting_of(chosen: argparse.Namespace) -> tuple[Setting, list[floors.Shape]]:
    """Where to measure, and what.

    Raises:
        UnsupportedEnvironmentError: There is no GPU.
    """
    if chosen.tiny:
        # float32: a CPU rounds bfloat16 elsewhere than the kernels do
        setting = Setting(device="cpu", dtype=torch.float32, n_calls=3, seed=chosen.seed)
        small = {"query_heads": 4, "head_dim": 16, "slots": 4, "itemsize": 4}
        return setting, [floors.Shape(tokens=150, group=group, **small) for group in (4, 1)]
    check_gpu()
    setting = Setting(device="cuda", dtype=torch.bfloat16, n_calls=chosen.calls, seed=chosen.seed)
    shapes = [
        floors.Shape(tokens=tokens, group=group)
        for tokens in chosen.tokens
        for group in chosen.groups
    ]
    return setting, shapes


def run(chosen: argparse.Namespace, name: str, measure: Measure) -> tuple[list[Record], int]:
    """Measure, and keep each record in the file `name` as it comes.

    Returns:
        The records, and the exit code: 1 if a kernel of ours was wrong or failed, or nothing ran.
    """
    try:
        setting, shapes = setting_of(chosen)
    except SparseCompileError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return [], 1
    gc.collect()
    gc.freeze()  # what is imported stays: each measurement of memory collects garbage first
    found, missing = peers.load(None if chosen.no_peers else chosen.peers)
    for peer, reason in missing.items():
        print(f"{peer}: {reason}", file=sys.stderr)
    where = common.environment(setting.device) | {"peers_missing": missing}
    records: list[Record] = []
    bad = False
    try:
        for record in measure(shapes, setting, found):
            records.append({**record, **where})
            bad |= record["kind"] == "ours" and record["status"] in ("wrong", "failed")
            print(progress(record), file=sys.stderr)
            # after each measurement: a run that is cut off keeps what it has
            common.write_json(name, records, chosen.output)
    except DeviceLostError as error:
        print(f"The device is lost, the rest is not measured: {error}", file=sys.stderr)
        bad = True
    finally:
        gc.unfreeze()
    return records, int(bad)


def progress(record: Record) -> str:
    """A measurement on one line."""
    about = [record[name] for name in ("part", "pattern", "tokens", "group") if name in record]
    words = [*about, record["variant"], record["direction"], record["status"]]
    if "median_ms" in record:
        words.append(f"{record['median_ms']:.3f} ms")
    if "error" in record:
        words.append(f"error {record['error']:.1e}")
    if "reason" in record:
        words.append(record["reason"])
    return " ".join(str(word) for word in words)


def pivot(
    title: str, records: Sequence[Record], by: Sequence[str], lead: Sequence[str],
    cell: Callable[[Record], object],
) -> None:  # fmt: skip
    """Print one row a case and one column a variant.

    Args:
        title: Above the table.
        records: Of one direction.
        by: Fields that tell cases apart; the first columns.
        lead: Fields that are the same for all variants of a case; the next columns.
        cell: What to show of a record.
    """
    names = list(dict.fromkeys(record["variant"] for record in records))
    rows: dict[tuple[object, ...], dict[str, object]] = {}
    for record in records:
        row = rows.setdefault(tuple(record[name] for name in by), {})
        row |= {name: record[name] for name in lead if record.get(name) is not None}
        row[record["variant"]] = cell(record)
    lines = [[*case, *(row.get(name) for name in (*lead, *names))] for case, row in rows.items()]
    common.print_table(title, [*by, *lead, *names], lines)


def show_times(title: str, records: Sequence[Record], by: Sequence[str]) -> None:
    """Print times and shares of the floor: ours beside floors and targets, then the others'.

    Args:
        title: Above the tables.
        records: Of one direction.
        by: Fields that tell cases apart.
    """
    ours = [dict(r) for r in records if r["kind"] == "ours"]
    orders: dict[str, None] = {}  # whose time on the L2 cache is known
    for record in ours:
        if record.get("loop_order_l2_ms") is not None:
            column = f"L2 {record['variant']}"
            orders[column] = None
            record[column] = record["loop_order_l2_ms"]
    others = [r for r in records if r["kind"] != "ours"]
    title = f"{title}: ms and share of the floor"
    pivot(title, ours, by, ("floor_ms", *orders, "target_ms"), _with_share)
    pivot(f"{title}, others", others, by, (), _with_share)


def _with_share(record: Record) -> str:
    """Milliseconds and the share of the floor, or what went wrong."""
    if "median_ms" not in record:
        return record["status"]
    part = record.get("floor_share")
    return f"{record['median_ms']:.2f}" + ("" if part is None else f" {part:.0%}")


def show_memory(title: str, records: Sequence[Record], by: Sequence[str]) -> None:
    """Print memory beyond inputs and outputs: ours beside what was agreed, then the others'."""
    ours = [r for r in records if r["kind"] == "ours"]
    others = [r for r in records if r["kind"] != "ours"]
    title = f"{title}: MiB beyond inputs and outputs"
    pivot(title, ours, by, ("at_most_mib",), _mebibytes)
    pivot(f"{title}, others", others, by, (), _mebibytes)


def _mebibytes(record: Record) -> str | None:
    n_bytes = record.get("extra_bytes")
    return None if n_bytes is None else f"{n_bytes / 2**20:.0f}"


def show_host(title: str, records: Sequence[Record], by: Sequence[str]) -> None:
    """Print what the host takes to launch: where it is more than the time, it decides the pace."""
    known = [r for r in records if r.get("host_ms") is not None and r["kind"] != "dense"]
    if known:
        pivot(f"{title}: ms until the host has launched", known, by, (), _host)


def _host(record: Record) -> str:
    return f"{record['host_ms']:.2f}"


def verdicts(records: Sequence[Record], by: Sequence[str]) -> list[list[object]]:
    """One row a case: the goal, what our chosen kernel takes, and whether that meets it.

    The goal is what the project agreed on; where it agreed on nothing, the fastest library.

    Args:
        records: Of one direction.
        by: Fields that tell cases apart.
    """
    cases: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        cases.setdefault(tuple(record[name] for name in by), []).append(record)
    rows: list[list[object]] = []
    for case, members in cases.items():
        timed = [record for record in members if "median_ms" in record]
        fastest = {
            kind: min((r for r in timed if r["kind"] == kind), key=_median, default=None)
            for kind in ("ours", "peer")
        }
        chosen = next((r for r in timed if r["variant"] == "chosen"), None)
        best, peer = fastest["ours"], fastest["peer"]
        goal = next((r["target_ms"] for r in members if r.get("target_ms")), None)
        goal = goal or (peer and peer["median_ms"])
        met = None
        if goal is not None and chosen is not None:
            met = "met" if chosen["median_ms"] <= goal else "missed"
        rows.append([*case, goal, *_named(chosen)[1:], *_named(best), *_named(peer), met])
    return rows


VERDICT_COLUMNS = ("goal", "chosen", "our best", "ms", "best peer", "ms", "")


def _named(record: Record | None) -> tuple[str | None, float | None]:
    return (None, None) if record is None else (record["variant"], record["median_ms"])


def _median(record: Record) -> float:
    return record["median_ms"]
