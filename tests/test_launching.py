"""What launchers share."""

import pytest

from sparse_compile.kernels.launching import Repeated, padded


class Kernel:
    """Stands for a Triton function, and for what it is compiled to."""

    def __init__(self, name: str, log: list[tuple[object, ...]], compiled: "Kernel | None") -> None:
        self.name, self.log, self.compiled = name, log, compiled

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.log.append((self.name, grid, args, options))
            return self.compiled

        return launch


def test_only_the_first_launch_looks_for_the_compiled_kernel() -> None:
    log: list[tuple[object, ...]] = []
    launch = Repeated(Kernel("function", log, Kernel("compiled", log, None)), num_warps=4)
    for programs in (7, 0, 9):
        launch(programs, "tensor", programs)
    assert log == [
        ("function", (7,), ("tensor", 7), {"num_warps": 4}),
        ("compiled", (0, 1, 1), ("tensor", 0), {}),  # options are in the compiled kernel
        ("compiled", (9, 1, 1), ("tensor", 9), {}),
    ]


def test_interpreted_kernels_are_launched_as_they_are() -> None:
    log: list[tuple[object, ...]] = []
    launch = Repeated(Kernel("function", log, None), num_warps=4)
    launch(1, "a")
    launch(2, "b")
    assert [(name, grid, options) for name, grid, _, options in log] == [
        ("function", (1,), {"num_warps": 4}),
        ("function", (2,), {"num_warps": 4}),
    ]


@pytest.mark.parametrize(("size", "wide"), [(1, 16), (16, 16), (17, 32), (80, 128), (256, 256)])
def test_tiles_are_as_wide_as_products_need(size: int, wide: int) -> None:
    assert padded(size) == wide
