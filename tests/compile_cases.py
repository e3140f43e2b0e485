"""What the compile gate compiles: every tuned kernel, by default and shipped values."""

from collections.abc import Iterator

from sparse_compile.kernels import tuning_results, tuning_tables
from sparse_compile.tuner.precompile import Task, small
from sparse_compile.tuner.shapes import Shape

# name: shape and dtype; what else a shape may be is in the tests that run on a GPU
PROBLEMS: dict[str, tuple[Shape, str]] = {
    "D128-G4": (Shape(tokens=8192), "bfloat16"),
    "D64-G16": (Shape(tokens=8192, kv_heads=2, head_dim=64), "bfloat16"),
    "D192-128-G1": (Shape(tokens=600, kv_heads=32, head_dim=192, value_dim=128), "bfloat16"),
    "D256-G4-block128": (Shape(tokens=8192, head_dim=256, block_size=128), "float16"),
    "D64-fp32": (Shape(tokens=8192, head_dim=64), "float32"),
}


def defaults() -> Iterator[tuple[str, Task]]:
    """Every kernel's default values for every problem, with an id."""
    for kernel in tuning_tables.names():
        table = tuning_tables.load(kernel)
        for name, (shape, dtype) in PROBLEMS.items():
            yield f"{kernel}-{name}", small(kernel, shape, dtype, table.default)


def shipped() -> Iterator[tuple[str, Task]]:
    """Every different entry of the shipped results, on a shape that has its key."""
    seen = set()
    for kernel in tuning_tables.names():
        table = tuning_tables.load(kernel)
        for file in tuning_tables.folder().iterdir():
            if not (file.name.startswith(f"{kernel}.") and file.name.endswith(".json")):
                continue
            results, problems = tuning_results.read(file, table)
            assert results is not None, problems
            for entry in results.entries:
                shape = shape_of(entry.key)
                task = small(kernel, shape, entry.dtype, entry.values)
                if task not in seen:
                    seen.add(task)
                    yield f"{kernel}-{len(seen)}", task


def shape_of(key: dict[str, int]) -> Shape:
    """A shape that has a key."""
    fields = {"head_dim": "head_dim", "value_dim": "value_dim", "block_size": "block_size",
              "k": "slots"}  # fmt: skip
    sizes = {field: key[fact] for fact, field in fields.items() if fact in key}
    if "own_runs" in key:
        sizes["block_size"] = 16 * key["own_runs"]
    group = key.get("group", 4)
    return Shape(tokens=8192, query_heads=32, kv_heads=max(1, 32 // group), **sizes)
