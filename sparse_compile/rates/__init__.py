"""What a device reaches, measured: the numbers that the cost model divides by.

They are looked up in this order: what `sparse-compile doctor --measure` wrote to the user's cache
on this machine; the file of this folder for a device of this name; that for another card of the
same model (any H100 for an H100); `DEFAULT`. A file of the cache that another PyTorch or Triton
wrote, or that cannot be read, is reported once and ignored.

Two files describe a device: `NAME.json`, which `doctor --measure` writes, and
`NAME.efficiency.json`, which `benchmarks/planner_regret.py --fit` writes: what share of the roof our
kernels reach.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import tempfile
from importlib import metadata, resources
from pathlib import Path

import msgspec

from sparse_compile import settings
from sparse_compile.errors import RatesError

logger = logging.getLogger(__name__)

VERSION = 1
DEFAULT = "NVIDIA H100 80GB HBM3"  # whose numbers stand for a device that nobody measured
FOLDER = "rates"  # in the cache


class Level(msgspec.Struct, frozen=True, array_like=True):
    """How fast memory is while a kernel touches no more than a footprint."""

    footprint_bytes: int
    bytes_per_s: float


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device reaches, and who found it out."""

    version: int
    device: str  # as torch.cuda.get_device_name says it
    torch: str
    triton: str
    origin: str  # in words: what measured it, and when
    copy_bytes_per_s: float  # read and write counted, from memory to memory
    reread_bytes_per_s: tuple[Level, ...]  # tiles that are read again and again; ascending
    atomic_bytes_per_s: tuple[Level, ...]  # float32 additions, four bytes each; ascending
    program_bytes_per_s: float  # tiles read by one program that runs alone
    flops_per_s: dict[str, float]  # dtype -> of a large matrix product
    launch_s: float  # from one launch of a small kernel to the next

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be divided by."""
        singles = (self.copy_bytes_per_s, self.program_bytes_per_s, self.launch_s)
        levels = (self.reread_bytes_per_s, self.atomic_bytes_per_s)
        numbers = [
            *singles,
            *self.flops_per_s.values(),
            *(x for level in levels for _, x in pairs(level)),
        ]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError("every rate must be a finite number above 0")
        for level in levels:
            sizes = [size for size, _ in pairs(level)]
            if not sizes or sizes[0] <= 0 or sizes != sorted(set(sizes)):
                raise ValueError("footprints must ascend from above 0, and there must be one")
        if not self.flops_per_s:
            raise ValueError("flops_per_s must name a dtype")
        if self.version != VERSION:
            raise ValueError(f"version is {self.version}, expected {VERSION}")


class Efficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What share of the roof each stage of our kernels reaches on a device."""

    version: int
    device: str
    origin: str  # in words: from which measurements
    stages: dict[str, float]  # "kv_major.attend" -> share, above 0

    def __post_init__(self) -> None:
        """Refuse shares that nothing can be divided by."""
        if not all(math.isfinite(share) and share > 0 for share in self.stages.values()):
            raise ValueError("every share must be a finite number above 0")
        if self.version != VERSION:
            raise ValueError(f"version is {self.version}, expected {VERSION}")


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """All that the cost model knows of a device."""

    rates: Rates
    efficiency: Efficiency
    note: str = ""  # in words, where another device's numbers stand in


def pairs(levels: tuple[Level, ...]) -> list[tuple[int, float]]:
    """Footprints and what is reached in them."""
    return [(level.footprint_bytes, level.bytes_per_s) for level in levels]


def at_footprint(levels: tuple[Level, ...], footprint_bytes: float) -> float:
    """Bytes per second within a footprint: between two measured ones, a line on paper with
    logarithmic axes; beyond them, the nearest."""
    low = levels[0]
    if footprint_bytes <= low.footprint_bytes:
        return low.bytes_per_s
    for high in levels[1:]:
        if footprint_bytes <= high.footprint_bytes:
            share = math.log(footprint_bytes / low.footprint_bytes)
            share /= math.log(high.footprint_bytes / low.footprint_bytes)
            return low.bytes_per_s * (high.bytes_per_s / low.bytes_per_s) ** share
        low = high
    return low.bytes_per_s


@functools.lru_cache(maxsize=64)
def lookup(device: str) -> Device:
    """What is known of a device, in the order that this module describes; remembered.

    Args:
        device: As `torch.cuda.get_device_name` says it.
    """
    rates, efficiency = _shipped()
    shares = efficiency[_nearest(device, list(efficiency))]
    found = read_cache(device)
    if found is not None:
        return Device(rates=found, efficiency=shares)
    nearest = _nearest(device, list(rates))
    note = "" if nearest == device else f"rates of {nearest}, since nobody measured {device}"
    return Device(rates=rates[nearest], efficiency=shares, note=note)


def slug(device: str) -> str:
    """The stem of a device's files: `"NVIDIA H200"` -> `"nvidia-h200"`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def cache_file(device: str) -> Path:
    """Where `doctor --measure` writes."""
    return settings.read().cache_dir / FOLDER / f"{slug(device)}.json"


def installed() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    return {name: _version(name) for name in ("torch", "triton")}


def read_cache(device: str) -> Rates | None:
    """What was measured on this machine; None if nothing was, or if it cannot be used any more."""
    path = cache_file(device)
    try:
        rates = msgspec.json.decode(path.read_bytes(), type=Rates)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning("%s is ignored: %s; run sparse-compile doctor --measure again", path, error)
        return None
    stamp = {"device": device, **installed()}
    for name, wanted in stamp.items():
        if getattr(rates, name) != wanted:
            logger.warning(
                "%s is ignored: it was measured with %s %s, this is %s; run sparse-compile doctor "
                "--measure again",
                path, name, getattr(rates, name), wanted,
            )  # fmt: skip
            return None
    return rates


def write(rates: Rates | Efficiency, path: Path) -> None:
    """Write a file whole or not at all, and forget what was looked up before.

    Raises:
        RatesError: It cannot be written.
    """
    text = msgspec.json.format(msgspec.json.encode(rates), indent=1) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text)
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise RatesError(
            f"{path} cannot be written ({error.strerror}).\n"
            "  Expected a path in a folder that you may write to.\n"
            f"  Name another with --output, or set {settings.CACHE_VARIABLE}."
        ) from error
    lookup.cache_clear()


def _nearest(device: str, known: list[str]) -> str:
    if device in known:
        return device
    models = set(re.findall(r"[A-Z]+[0-9]+[A-Z]*", device))  # H100 of "NVIDIA H100 PCIe"
    alike = (name for name in known if models.intersection(name.replace("-", " ").split()))
    return next(alike, DEFAULT)


@functools.lru_cache(maxsize=1)
def _shipped() -> tuple[dict[str, Rates], dict[str, Efficiency]]:
    rates, efficiency = {}, {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".efficiency.json"):
            share = msgspec.json.decode(file.read_bytes(), type=Efficiency)
            efficiency[share.device] = share
        elif file.name.endswith(".json"):
            rate = msgspec.json.decode(file.read_bytes(), type=Rates)
            rates[rate.device] = rate
    return rates, efficiency


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
