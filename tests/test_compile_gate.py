"""Every tuned kernel compiles for an H100 where there is none, and fits into its memories.

Compiled in a process of its own, since this one interprets kernels. What compiles here was seen to
run on the GPU; what does not compile, or spills, needs no GPU to be found.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sparse_compile.kernels import compile_only, tuning_tables
from sparse_compile.tuner.precompile import Compiled, Precompiler
from sparse_compile.tuner.workloads import WORKLOADS
from tests.compile_cases import defaults, shipped
from tests.triton_ir import overwritten

DEFAULTS, SHIPPED = dict(defaults()), dict(shipped())
SHARED_BYTES = 227 * 1024  # what a program may have on an H100
# Bytes of stack of a thread. Some are taken by the compiler for indices; more are registers that
# were spilled, and each costs a trip through the L1 cache in every turn of the inner loop.
STACK_BYTES = 128
MORE_STACK = {  # what was seen and is accepted, with room for another compiler
    # tiles of 256 numbers a row
    "range_key_gradient-D256-G4-block128": 512,
    "range_query_gradient-D256-G4-block128": 512,  # launches the same
    "select_top_k-D256-G4-block128": 512,
    # sorted lists and products without matrix units, all in registers
    "select_top_k-D64-fp32": 2048,
    "selected_backward-D192-128-G1": 256,
    # 128 keys and values of 256 numbers and their gradients: nothing smaller fits
    "selected_backward-D256-G4-block128": 1408,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Triton keeps what it compiles: empty, so that all of it is seen; one for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def compiler(cache: Path) -> Iterator[Precompiler]:
    # one at a time: tests run in several processes already, and share nothing
    with Precompiler(compile_only.SM90, workers=1) as started:
        yield started


@functools.cache
def races(file: Path) -> set[str]:
    return overwritten(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*DEFAULTS, *(f"shipped-{name}" for name in SHIPPED)])
def test_compiles_for_sm90(compiler: Precompiler, cache: Path, name: str) -> None:
    task = DEFAULTS[name] if name in DEFAULTS else SHIPPED[name.removeprefix("shipped-")]
    compiled = compiler.result(task)
    assert not compiled.error
    assert compiled.needs
    for needs in compiled.needs:
        assert needs.shared_bytes <= SHARED_BYTES, needs
        assert needs.stack_bytes <= MORE_STACK.get(name, STACK_BYTES), needs
    written = list(cache.rglob("*.ttir"))
    assert {needs.kernel for needs in compiled.needs} <= {file.stem for file in written}
    assert not {file.stem: races(file) for file in written if races(file)}


def test_what_cannot_run_is_found(compiler: Precompiler) -> None:
    task = DEFAULTS["range_forward-D64-G16"]

    def with_values(**values: int) -> Compiled:
        return compiler.result(task._replace(values=tuple(sorted(values.items()))))

    too_large = with_values(block_m=64, block_n=128, num_warps=8, num_stages=8)
    assert "shared memory" in too_large.error
    spilled = with_values(block_m=64, block_n=64, num_warps=1, num_stages=1)
    assert spilled.stack_bytes > STACK_BYTES


def test_every_table_has_a_workload_and_the_other_way_round() -> None:
    assert sorted(WORKLOADS) == tuning_tables.names()


CUT_BY_SIZE = {"_rank_kernel", "_fill_kernel"}  # chunks are constants, and not tuned


def test_the_small_problem_has_the_code_of_the_large_one() -> None:
    """What is compiled ahead must be what the full size asks for, not a variant of it."""
    with Precompiler(workers=1) as compiler:
        for kernel in WORKLOADS:
            task = DEFAULTS[f"{kernel}-D64-G16"]
            assert compiler.result(task).needs, kernel
            tokens = 2 * task.shape.tokens
            larger = task._replace(
                shape=msgspec.structs.replace(task.shape, tokens=tokens, keys=tokens)
            )
            again = compiler.result(larger)
            assert not again.error
            assert set(again.new) <= CUT_BY_SIZE, kernel  # all was there
