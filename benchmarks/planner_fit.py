"""Judges the planner by records of `benchmarks.planner_regret`, and fits efficiencies to them."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks import common
from sparse_compile import costs, rates
from sparse_compile.cost_formulas import BACKWARD, DENSE, DENSE_BACKWARD, LOOP_ORDERS, PARTS
from sparse_compile.costs import Overlap, Problem
from sparse_compile.rates import Device, Efficiency

NEAR = 0.1  # of the fastest's time: a pick that is hardly worse
LOWEST, HIGHEST = 0.01, 2.0  # shares; above 1: the roof was measured less well than the kernel
PULL = 0.003  # of each share towards what the part reaches as a whole, where records say little
CASE = (
    "query_heads", "group", "n_slots", "head_dim", "block_size", "batch", "n_queries", "n_keys",
    "pattern",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the planner picked for a case, beside the fastest."""

    case: str
    direction: str  # "forward", "forward + backward"
    knows: str  # "sizes", "overlap"; with dense attention allowed: "sizes, dense allowed"
    picked: str
    predicted_ms: float
    picked_ms: float
    fastest: str
    fastest_ms: float

    @property
    def regret(self) -> float:
        """Time lost, as a share of the fastest's."""
        return self.picked_ms / self.fastest_ms - 1


def by_case(records: Sequence[common.Record]) -> list[list[common.Record]]:
    """Records that speak of the same case together, those without times left out."""
    found: dict[tuple[object, ...], list[common.Record]] = {}
    for record in records:
        if record["status"] == "ok":
            found.setdefault(tuple(record[name] for name in CASE), []).append(record)
    return list(found.values())


def problem_of(record: common.Record, *, knows_overlap: bool = True) -> Problem:
    """The problem that a record is about."""
    overlap = Overlap(shared=record["shared"], left=record["left"]) if knows_overlap else None
    return Problem(
        batch=record["batch"], n_queries=record["n_queries"], n_keys=record["n_keys"],
        query_heads=record["query_heads"], kv_heads=record["query_heads"] // record["group"],
        head_dim=record["head_dim"], n_slots=record["n_slots"], block_size=record["block_size"],
        dtype=record["dtype"], overlap=overlap,
    )  # fmt: skip


def judge(records: Sequence[common.Record], device: Device) -> list[Choice]:
    """The planner's picks for every case in which all loop orders could be timed.

    Gradients count as many milliseconds for every loop order, since they are the same kernels.
    """
    found = []
    for group in by_case(records):
        ms = {record["part"]: record["median_ms"] for record in group}
        orders = [name for name in LOOP_ORDERS if name in ms]
        if len(orders) < 2 or DENSE not in ms:
            continue
        directions = {"forward": ms}
        if BACKWARD in ms and DENSE_BACKWARD in ms:
            both = {name: ms[name] + ms[costs.backward_of(name)] for name in (*orders, DENSE)}
            directions["forward + backward"] = both
        for direction, times in directions.items():
            for knows in ("sizes", "overlap", "sizes, dense allowed"):
                problem = msgspec.structs.replace(
                    problem_of(group[0], knows_overlap=knows == "overlap"),
                    backward=direction != "forward",
                )
                allowed = [*orders, DENSE] if "dense" in knows else orders
                predicted = costs.predict(problem, device, orders).ms
                picked = min(allowed, key=predicted.__getitem__)
                fastest = min(allowed, key=times.__getitem__)
                found.append(
                    Choice(
                        case=case_name(group[0]), direction=direction, knows=knows, picked=picked,
                        predicted_ms=predicted[picked], picked_ms=times[picked], fastest=fastest,
                        fastest_ms=times[fastest],
                    )
                )  # fmt: skip
    return found


def case_name(record: common.Record) -> str:
    """A case in a few letters: `B1 T32768 S32768 G4 K16x64 D128 random`."""
    return (
        f"B{record['batch']} T{record['n_queries']} S{record['n_keys']} G{record['group']} "
        f"K{record['n_slots']}x{record['block_size']} D{record['head_dim']} {record['pattern']}"
    )


def summary(choices: Sequence[Choice]) -> list[tuple[object, ...]]:
    """Rows of a table: cases, picks that were the fastest, near it, and quantiles of the regret."""
    rows = []
    for kind in dict.fromkeys((choice.direction, choice.knows) for choice in choices):
        regrets = sorted(c.regret for c in choices if (c.direction, c.knows) == kind)
        n = len(regrets)
        rows.append(
            (
                ", ".join(kind), n, 100 * sum(x == 0 for x in regrets) / n,
                100 * sum(x <= NEAR for x in regrets) / n, statistics.median(regrets),
                regrets[round(0.9 * (n - 1))], regrets[-1],
            )
        )  # fmt: skip
    return rows


def fit(records: Sequence[common.Record]) -> Efficiency:
    """Shares of the roof with which the predictions come nearest to the records.

    Each part (a loop order, gradients, dense attention) is fitted for itself: the sum over its
    records of the squared logarithm of predicted over measured is made small, by turns in every
    share.
    """
    name = records[0]["rates_device"]
    device = rates.lookup(name)
    stages: dict[str, float] = {}
    errors = []
    for part in PARTS:
        own = [r for group in by_case(records) for r in group if r["part"] == part]
        if own:
            shares, error = _fit_part(part, own, device)
            stages |= shares
            errors.append(f"{part} {error:.0%}")
        else:
            known = device.efficiency.stages.items()
            stages |= {stage: share for stage, share in known if stage.startswith(f"{part}.")}
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    origin = (
        f"benchmarks/planner_regret.py --fit, {day}: {len(by_case(records))} cases on "
        f"{records[0]['device']}, commit {records[0]['commit']}; median error {', '.join(errors)}"
    )
    return Efficiency(version=rates.VERSION, device=name, origin=origin, stages=stages)


def held_out(records: Sequence[common.Record]) -> list[Choice]:
    """The picks for each half of the cases, with shares fitted to the other half."""
    groups = by_case(records)
    halves = [[r for group in groups[i::2] for r in group] for i in (0, 1)]
    known = rates.lookup(records[0]["rates_device"])
    found = []
    for seen, unseen in (halves, halves[::-1]):
        if seen and unseen:
            device = Device(rates=known.rates, efficiency=fit(seen))
            found += judge(unseen, device)
    return found


def shipped_path(device: str) -> Path:
    """Where the shares of a device are shipped."""
    return common.ROOT / "sparse_compile" / "rates" / f"{rates.slug(device)}.efficiency.json"


def _fit_part(
    part: str, records: Sequence[common.Record], device: Device
) -> tuple[dict[str, float], float]:
    """Shares of a part's stages and of its launches, and the median relative error."""
    roofs: list[list[float]] = []
    names: list[str] = []
    for record in records:
        problem = problem_of(record)
        stages, launches = costs.evaluate(part, problem.values(), causal=True)
        names = [*stages, f"{part}.launch"]
        work = [costs.roof_s(numbers, device, problem.dtype) for numbers in stages.values()]
        roofs.append([*work, launches * device.rates.launch_s])
    measured = [record["median_ms"] / 1e3 for record in records]

    def predicted(roof: Sequence[float], logs: Sequence[float]) -> float:
        *work, host = (x * math.exp(-log) for x, log in zip(roof, logs, strict=True))
        return max(sum(work), host)

    ratios = [max(sum(roof[:-1]), roof[-1]) / m for roof, m in zip(roofs, measured, strict=True)]
    whole = math.log(min(HIGHEST, max(LOWEST, statistics.median(ratios))))

    def loss(logs: Sequence[float]) -> float:
        misses = (
            math.log(predicted(roof, logs) / m) for roof, m in zip(roofs, measured, strict=True)
        )
        # beyond a factor of two a case counts no more than by its distance
        fits = sum(x * x if abs(x) < 0.7 else 1.4 * abs(x) - 0.49 for x in misses)
        return fits / len(measured) + PULL * sum((log - whole) ** 2 for log in logs)

    logs = _descend(loss, [whole] * len(names))
    errors = [abs(predicted(roof, logs) / m - 1) for roof, m in zip(roofs, measured, strict=True)]
    shares = {name: round(math.exp(log), 4) for name, log in zip(names, logs, strict=True)}
    return shares, statistics.median(errors)


def _descend(loss: Callable[[Sequence[float]], float], start: Sequence[float]) -> list[float]:
    """A minimum, by steps along each axis that become smaller when none of them helps."""
    at, best, step = list(start), loss(start), 0.5
    low, high = math.log(LOWEST), math.log(HIGHEST)
    while step > 0.005:
        before = best
        for i in range(len(at)):
            for sign in (step, -step):
                tried = [*at[:i], min(high, max(low, at[i] + sign)), *at[i + 1 :]]
                found = loss(tried)
                if found < best:
                    at, best = tried, found
        if best >= before * (1 - 1e-6):
            step /= 2
    return at
