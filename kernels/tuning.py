"""Which tuned values a launcher uses: pinned by the caller, user cache, shipped table, default.

Nothing is tuned here: `sparse-compile tune` does that, when it is called.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from sparse_compile.kernels import tuning_results, tuning_tables
from sparse_compile.kernels.tuning_tables import NEAR, Table, Values

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from sparse_compile.kernels.tuning_results import Entry, Results

log = logging.getLogger(__name__)
T = TypeVar("T", bound=Any)  # a named tuple

INTERPRETER = "Triton interpreter"  # the device's name without a GPU
TWINS = {
    "float16": "bfloat16",
    "bfloat16": "float16",
}  # compiled to the same code but for the dtype


class Tuned(Generic[T]):
    """The tuned values of one kernel; launchers ask it at every call.

    Args:
        kernel: The name of its table.
    """

    def __init__(self, kernel: str) -> None:
        """Reads no file: that waits until somebody asks."""
        self.kernel = kernel
        self._lock = threading.RLock()
        self._pin: tuple[tuple[str, int], ...] | None = None
        self._found: dict[tuple[Any, ...], Values] = {}
        self._files: dict[str, Results | None] = {}
        self._facts: tuple[tuning_tables.Fact, ...] = ()

    @property
    def table(self) -> Table:
        """What can be tuned."""
        return tuning_tables.load(self.kernel)

    def forget(self) -> None:
        """Read tables and results anew at the next call."""
        with self._lock:
            self._found, self._files, self._facts = {}, {}, ()

    def choose(self, default: T, tensor: torch.Tensor, **facts: int) -> T:
        """The tiles for a problem.

        Args:
            default: What the kernel computes from the sizes; tuned values are put on top.
            tensor: One of the inputs: its device and dtype count.
            facts: Those of the table's key.
        """
        key = (
            tensor.device, tensor.dtype, self._pin,
            *[fact.bucket(facts[fact.name]) for fact in self._facts or self._read_facts()],
        )  # fmt: skip
        found = self._found.get(key)
        if found is None:
            found = self._search(key, default)
        return default._replace(**found) if found else default

    @contextmanager
    def pinned(self, **values: int) -> Iterator[None]:
        """Use the default with these values in the whole process meanwhile, and nothing else.

        Raises:
            ConfigError: The kernel has no such value, or it is illegal.
        """
        self.table.check_values(values, f"pinned {self.kernel}")
        with self._lock:
            before, self._pin = self._pin, tuple({**dict(self._pin or ()), **values}.items())
        try:
            yield
        finally:
            with self._lock:
                self._pin = before

    def _read_facts(self) -> tuple[tuning_tables.Fact, ...]:
        self._facts = self.table.key
        return self._facts

    def _search(self, key: tuple[Any, ...], default: T) -> Values:
        device, dtype, pin, *buckets = key
        with self._lock:
            if key in self._found:
                return self._found[key]
            facts = {f.name: bucket for f, bucket in zip(self.table.key, buckets, strict=True)}
            name, kind = device_name(device), str(dtype).removeprefix("torch.")
            if pin is None:
                values, source = self.in_force(name, kind, facts)
            else:
                values, source = {**self.table.default, **dict(pin)}, "pinned by the caller"
            log.info(
                "%s for %s on %s, %s: %s (%s)", self.kernel, kind, name, _listed(facts),
                _listed(default._replace(**values)._asdict()), source,
            )  # fmt: skip
            self._found[key] = values
            return values

    def in_force(self, device: str, dtype: str, facts: dict[str, int]) -> tuple[Values, str]:
        """The values of a bucketed key where nothing is pinned, and where they are from."""
        name = tuning_results.file_name(self.kernel, device)
        files: tuple[tuple[str, Traversable], ...] = (
            ("user cache", tuning_results.user_folder() / name),
            ("shipped table", tuning_tables.folder().joinpath(name)),
        )
        for source, file in files:
            entries = self._entries(file, source)
            for one in (dtype, TWINS.get(dtype)):
                entry = nearest(entries, self.table, one, facts)
                if entry is not None:
                    exact = entry.key == facts and one == dtype
                    return entry.values, source if exact else f"{source}, nearest"
        return self.table.default, "default"

    def _entries(self, file: Traversable, source: str) -> tuple[Entry, ...]:
        """The usable entries of a file; what is wrong with it is said once."""
        known = f"{source} {file.name}"
        if known not in self._files:
            results, problems = tuning_results.read(file, self.table)
            for problem in problems:
                log.warning("tuning results skipped: %s", problem)
            if results is not None:
                results = self._fresh(results, file, source)
            self._files[known] = results
        found = self._files[known]
        return found.entries if found else ()

    def _fresh(self, results: Results, file: Traversable, source: str) -> Results | None:
        now = tuning_results.current_stamp(self.table)
        stale = results.stamp.differences(now, shipped=source == "shipped table")
        if not stale:
            return results
        log.warning(
            "tuning results ignored: %s (%s) was made for %s. `sparse-compile tune --kernel %s` "
            "makes new ones.",
            file.name, source, " and ".join(stale), self.kernel,
        )  # fmt: skip
        return None


def nearest(
    entries: tuple[Entry, ...], table: Table, dtype: str | None, facts: dict[str, int]
) -> Entry | None:
    """The entry of a key, or of the nearest that may serve for it; the smaller of two as near."""
    best: tuple[int, Entry] | None = None
    for entry in entries:
        if entry.dtype != dtype:
            continue
        distance = 0
        for fact in table.key:
            ours, wanted = entry.key[fact.name], facts[fact.name]
            factor = max(ours, wanted) // max(1, min(ours, wanted))
            if ours != wanted and (fact.kind != "nearest" or factor > NEAR):
                break
            distance += factor.bit_length() - 1
        else:
            if best is None or distance < best[0]:
                best = (distance, entry)
    return None if best is None else best[1]


def device_name(device: torch.device) -> str:
    """What results of a device are filed under."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return INTERPRETER


def _listed(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
