"""Compile Triton kernels for a GPU that is not there, and measure what they need.

`install` puts a driver into Triton that compiles every launch for a target and runs nothing.
Launchers then take CPU tensors; what they return is meaningless. Compiled code goes to Triton's
cache, where a process with that GPU finds it.

It is for processes of their own: Triton decides at import whether it interprets kernels, and the
driver stays.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

SM90 = 90  # H100 and H200
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}  # of a program


class Needs(NamedTuple):
    """What one compiled kernel needs."""

    kernel: str
    shared_bytes: int  # of a program
    registers: int  # of a thread
    stack_bytes: int  # of a thread: what did not fit into the registers is spilled there


class Record(NamedTuple):
    """What happened since it was cleared."""

    compiled: list[Needs]  # or read from Triton's cache: what this process did not have yet
    launched: list[Needs]

    def clear(self) -> None:
        """Forget."""
        self.compiled.clear()
        self.launched.clear()


def install(capability: int = SM90) -> Record:
    """Compile for a capability from now on; returns what every launch is put on."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime import driver

    record = Record([], [])
    driver.set_active(_driver(capability, record))
    return record


def _driver(capability: int, record: Record) -> Any:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver

    class Driver(GPUDriver):
        """Knows a target, and has nothing to run on."""

        def __init__(self) -> None:
            self.utils = SimpleNamespace(
                get_device_properties=_properties, load_binary=_load, unload_module=lambda _: None
            )
            self.launcher_cls = Launcher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda _device: None
            self.get_current_stream = lambda _device=0: 0
            self.get_device_capability = lambda _device=0: divmod(capability, 10)

        @staticmethod
        def is_active() -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing can be timed without a GPU")

    def _properties(_device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES.get(capability, 101_376), "warpSize": 32,
                "multiprocessor_count": 132, "max_num_regs": 65536}  # fmt: skip

    def _load(
        name: str, binary: bytes, shared: int, _device: int
    ) -> tuple[object, object, int, int, int]:
        registers, stack = resources_of(binary)
        needs = Needs(name, shared, registers, stack)
        record.compiled.append(needs)
        return object(), needs, registers, stack // 4, 1024

    class Launcher:
        """Takes a launch and runs nothing."""

        def __init__(self, _source: object, _metadata: object) -> None:
            pass

        def __call__(
            self, _x: int, _y: int, _z: int, _stream: int, function: Needs, *_args: object
        ) -> None:
            record.launched.append(function)

    return Driver()


def resources_of(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as `cuobjdump` reports them.

    Raises:
        FileNotFoundError: This Triton comes without the program.
        ValueError: Its report cannot be read.
    """
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        report = subprocess.run(
            [program, "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if numbers is None:
        raise ValueError(f"cuobjdump reports no registers: {report!r}")
    return int(numbers[1]), int(numbers[2])
