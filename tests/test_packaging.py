"""The source tree, the links, the package list and what is built from them must agree."""

import itertools
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TOPS = {
    "sparse_compile": "sparse_compile",
    "passes": "sparse_compile/passes",
    "kernels": "sparse_compile/kernels",
}
LINKED = ("sparse_compile/kernels/", "sparse_compile/passes/")
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())


def shipped_files(root: Path) -> set[str]:
    """Every file of ours in a source tree, as a wheel must name it."""
    found = set()
    for top, name in TOPS.items():
        for folder, folders, files in os.walk(root / top):  # does not follow links
            folders[:] = [each for each in folders if each != "__pycache__"]
            inner = Path(folder).relative_to(root / top)
            found |= {str(Path(name, inner, file)) for file in files if not file.endswith(".pyc")}
    return found


@pytest.mark.parametrize("folder", ["kernels", "passes"])
def test_folder_is_linked_and_not_a_top_level_package(folder):
    assert not (ROOT / folder / "__init__.py").exists()
    link = ROOT / "sparse_compile" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder
    assert not Path(os.readlink(link)).is_absolute()


def test_every_code_folder_is_listed():
    listed = METADATA["tool"]["setuptools"]["packages"]
    folders = {str(Path(file).parent).replace("/", ".") for file in shipped_files(ROOT)}
    assert folders == set(listed)
    assert listed == sorted(listed)


def test_version_is_that_of_the_package():
    import sparse_compile

    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {sparse_compile.__version__}" in changelog


def test_constraints_pin_every_direct_dependency():
    pinned = {
        line.split("==")[0].lower().replace("_", "-"): line.split("==")[1]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    project = METADATA["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    for requirement in (*project["dependencies"], *extras):
        name = requirement.replace("<", ">").split(">")[0].split("[")[0].lower()
        if name != "sparse-compile" and "python_version <" not in requirement:
            assert name in pinned, requirement
    assert pinned["torch"] == "2.13.0"


def run(*command: str, cwd: Path, timeout: int = 300) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Built(NamedTuple):
    """What was built from a copy of the working tree."""

    files: set[str]  # that a wheel must hold
    wheel: Path
    sdist: Path
    wheel_from_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    copied = ["pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", *TOPS]
    run(
        "cp", "-r", "--no-dereference", *(str(ROOT / name) for name in copied), str(source), cwd=out
    )
    files = shipped_files(source)
    build = (sys.executable, "-m", "build", "--no-isolation", str(source), "--outdir")
    run(*build, str(out / "both"), cwd=out)  # an sdist, then a wheel from that sdist
    run(*build, str(out / "wheel"), "--wheel", cwd=out)
    (wheel,), (from_sdist,) = (out / "wheel").glob("*.whl"), (out / "both").glob("*.whl")
    (sdist,) = (out / "both").glob("*.tar.gz")
    return Built(files, wheel, sdist, from_sdist)


@pytest.mark.slow
class TestBuilt:
    @pytest.mark.parametrize("kind", ["wheel", "wheel_from_sdist"])
    def test_wheel_has_every_file(self, built, kind):
        with zipfile.ZipFile(getattr(built, kind)) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == built.files

    def test_sdist_has_every_file_once(self, built):
        with tarfile.open(built.sdist) as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
        names = [member.name.split("/", 1)[1] for member in members]
        linked = {file for file in built.files if file.startswith(LINKED)}
        assert linked
        wanted = built.files - linked | {file.removeprefix("sparse_compile/") for file in linked}
        assert wanted | {"LICENSE", "README.md", "pyproject.toml"} <= set(names)
        assert not [name for name in names if name.startswith(LINKED)]
        assert len(names) == len(set(names))

    def test_metadata(self, built):
        with zipfile.ZipFile(built.wheel_from_sdist) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/entry_points.txt"))
            points = archive.read(name).decode()
            assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
        assert (
            "[torch_dynamo_backends]\nsparse_compile = sparse_compile.backend:sparse_compile"
            in (points)
        )
        assert "sparse-compile = sparse_compile.cli:main" in points

    def test_wheel_is_importable_on_its_own(self, built, tmp_path):
        with zipfile.ZipFile(built.wheel_from_sdist) as archive:
            archive.extractall(tmp_path)
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "editable = [f for f in sys.meta_path if '__editable__' in getattr(f, '__module__', '')]\n"
            "for finder in editable: sys.meta_path.remove(finder)\n"
            "import sparse_compile, sparse_compile.config, sparse_compile.passes.shapes as shapes\n"
            "assert sys.argv[1] in sparse_compile.__file__, sparse_compile.__file__\n"
            "assert sys.argv[1] in shapes.__file__, shapes.__file__"
        )
        run(sys.executable, "-I", "-c", code, str(tmp_path), cwd=tmp_path)


@pytest.mark.parametrize("module", ["passes.shapes", "cli.doctor", "inspect.report", "config"])
def test_modules_are_imported_by_their_names(module):
    code = (
        f"import importlib; m = importlib.import_module('sparse_compile.{module}'); "
        "print(m.__name__)"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == [f"sparse_compile.{module}"]


def test_kernel_modules_are_imported_by_their_names():
    names = [path.stem for path in (ROOT / "kernels").glob("*.py")]
    assert names
    code = "import importlib, sys\nfor n in sys.argv[1:]: importlib.import_module(n)"
    run(sys.executable, "-c", code, *(f"sparse_compile.kernels.{n}" for n in names), cwd=ROOT)


def test_our_folder_is_not_the_package_named_kernels(tmp_path):
    """In the repository's root, `import kernels` must find nothing that transformers would use.

    A folder without `__init__.py` is at most a namespace package, which has no origin and no
    installed distribution; transformers asks for both.
    """
    pytest.importorskip("transformers")
    code = (
        "import importlib.util, sys\n"
        "sys.path.insert(0, '')\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "from transformers.utils import is_kernels_available\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "print(getattr(spec, 'origin', None), is_kernels_available())\n"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == ["None", "False"]


def test_transformers_works_beside_an_installed_package_named_kernels(tmp_path):
    """With the real package present, its module wins over our folder in the root."""
    pytest.importorskip("transformers")
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("__version__ = '0.0.0'\n")
    code = (
        "import sys\n"
        "sys.path.insert(0, ''); sys.path.append(sys.argv[1])\n"
        "import kernels\n"
        "print(kernels.__file__)\n"
    )
    found = run(sys.executable, "-c", code, str(site), cwd=ROOT).strip()
    assert Path(found) == site / "kernels" / "__init__.py"
