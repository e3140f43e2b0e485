"""Imports point downwards only: the floors of the house, read from the source text.

Counted: absolute and relative imports, inside functions, under `TYPE_CHECKING`, and names that
`sparse_compile` re-exports, which count as the module they live in.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import sparse_compile

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sparse_compile"
FLOORS = {  # module or sub-package -> floor; the longest name that fits counts
    "_compat": 0,
    "_support": 0,
    "config": 0,
    "config_file": 0,
    "cost_formulas": 0,
    "costs": 0,
    "errors": 0,
    "evaluation": 0,
    "expressions": 0,
    "intervals": 0,
    "ir": 0,
    "option_checks": 0,
    "rates": 0,
    "settings": 0,
    "kernels": 1,
    "ops": 1,
    "ops_paged": 1,
    "ops_progressive": 1,
    "passes": 2,
    "backend": 3,
    "inspect": 3,
    "nn": 3,
    "pipeline": 3,
    "planner": 3,
    "policies": 3,
    "runtime": 3,
    "winners": 3,
    "cli": 4,
    "integrations": 4,
    "tuner": 4,
    "testing": 4,
    "__main__": 4,
}
FORBIDDEN_PACKAGES = {  # third-party package -> where it must not be imported
    "triton": (0, 2, 3, 4),
    "transformers": (0, 1, 2),
}


class Import(NamedTuple):
    """One imported module."""

    module: str  # absolute
    line: int


def modules() -> dict[str, Path]:
    """Every module of ours by its import name."""
    found = {}
    for top, name in ((PACKAGE, PACKAGE), ("kernels", "kernels"), ("passes", "passes")):
        prefix = PACKAGE if name == PACKAGE else f"{PACKAGE}.{name}"
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            if top == PACKAGE and parts[0] in ("kernels", "passes"):
                continue  # the links
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((prefix, *parts))] = path
    return found


MODULES = modules()


def floor_of(module: str) -> int | None:
    """The floor of a module of ours; None for the package itself, KeyError for an unknown one."""
    if module == PACKAGE:
        return None
    return FLOORS[module.split(".")[1]]


def home_of(name: str) -> str:
    """The module a name imported from `sparse_compile` stands for."""
    if f"{PACKAGE}.{name}" in MODULES or name in FLOORS:
        return f"{PACKAGE}.{name}"
    if name in sparse_compile.__all__ and not name.startswith("__"):
        return getattr(sparse_compile, name).__module__
    return PACKAGE


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every module that the source text of `module` imports."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")
                parent = parent[: len(parent) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            for alias in node.names:
                if base == PACKAGE:
                    yield Import(home_of(alias.name), node.lineno)
                elif f"{base}.{alias.name}" in MODULES:
                    yield Import(f"{base}.{alias.name}", node.lineno)
                else:
                    yield Import(base, node.lineno)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the source text of `module` imports and must not."""
    floor = floor_of(module)
    found = []
    for target, line in imports(source, module, is_package):
        top = target.split(".")[0]
        if top == PACKAGE and target != PACKAGE:
            if floor_of(target) > floor:
                found.append(f"{module}:{line} (floor {floor}) imports {target}, which is above it")
            elif target.split(".")[1] == "cli" and module.split(".")[1] not in ("cli", "__main__"):
                found.append(f"{module}:{line} imports the command line")
        elif floor in FORBIDDEN_PACKAGES.get(top, ()):
            found.append(f"{module}:{line} (floor {floor}) imports {top}")
        elif top == "torch" and is_private(target) and module != f"{PACKAGE}._compat":
            found.append(f"{module}:{line} imports {target}; private PyTorch goes through _compat")
    return found


def is_private(module: str) -> bool:
    """Whether a part of a module's name says that it is private."""
    return any(part.startswith("_") and not part.startswith("__") for part in module.split("."))


@pytest.mark.parametrize("module", [name for name in MODULES if name != PACKAGE])
def test_imports_point_downwards(module):
    path = MODULES[module]
    assert module.split(".")[1] in FLOORS, f"give {module} a floor in FLOORS"
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


def test_every_folder_is_walked():
    names = {module.split(".")[1] for module in MODULES if module != PACKAGE}
    assert {"config", "kernels", "passes", "cli", "inspect"} <= names
    assert len(MODULES) > 15


def test_the_package_itself_loads_nothing_of_a_floor_at_import():
    tree = ast.parse(MODULES[PACKAGE].read_text())
    eager = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {getattr(node, "module", None) or node.names[0].name for node in eager} <= {
        "__future__",
        "importlib",
        "typing",
    }


PLANTED = {
    "absolute": ("passes.detect", "import sparse_compile.backend"),
    "from-module": ("passes.detect", "from sparse_compile.inspect.report import Report"),
    "from-package": ("config", "from sparse_compile import ir, backend"),
    "re-exported-name": ("passes.detect", "from sparse_compile import Report"),
    "relative": ("passes.detect", "from ..inspect import report"),
    "relative-package": ("kernels.program", "from .. import backend"),
    "in-a-function": ("kernels.program", "def f():\n    from sparse_compile.passes import axes"),
    "type-checking": (
        "ir",
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from sparse_compile.passes.shadow import Shadow",
    ),
    "command-line": ("integrations.vllm", "from sparse_compile.cli import main"),
    "triton": ("passes.detect", "def f():\n    import triton.language as tl"),
    "transformers": ("passes.detect", "from transformers import AutoModel"),
    "private-torch": ("passes.detect", "from torch._inductor import config"),
    "private-torch-module": ("backend", "import torch.fx._symbolic_trace"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_violation_is_found(name):
    module, source = PLANTED[name]
    found = violations(source, f"{PACKAGE}.{module}")
    assert len(found) == 1
    assert f"{PACKAGE}.{module}:" in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("passes.detect", "from sparse_compile.kernels import program_attention"),
        ("passes.detect", "from sparse_compile import ir\nfrom . import axes\nimport torch.fx"),
        ("passes.detect", "from __future__ import annotations\nfrom sparse_compile import Config"),
        ("kernels.program", "import triton\nfrom sparse_compile.errors import OperatorError"),
        ("cli.inspect", "from sparse_compile.cli.doctor import doctor\nimport transformers"),
        ("__main__", "from sparse_compile.cli import main"),
        ("_compat", "import torch._dynamo"),
        ("config", "from sparse_compile import __version__"),
    ],
)
def test_near_miss_is_allowed(module, source):
    assert violations(source, f"{PACKAGE}.{module}") == []


def test_unknown_module_needs_a_floor():
    with pytest.raises(KeyError):
        floor_of(f"{PACKAGE}.attic")
