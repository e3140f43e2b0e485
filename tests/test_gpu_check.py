"""The record of the tests that ran on a GPU, and the check that it is about today's sources."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import common, gpu_check
from sparse_compile.errors import SparseCompileError

common_hashes = common.source_hashes  # the fixture below puts another in its place

JUNIT = """<?xml version="1.0"?>
<testsuites><testsuite name="pytest">
<testcase classname="tests.test_a" name="test_good" time="1.5"/>
<testcase classname="tests.test_a" name="test_bad" time="0.5">
  <failure message="assert 1 == 2">line one
E  assert 1 == 2</failure></testcase>
<testcase classname="tests.test_b" name="test_broken" time="0"><error message="fixture">boom</error></testcase>
<testcase classname="tests.test_b" name="test_off" time="0"><skipped message="needs more memory"/></testcase>
</testsuite></testsuites>
"""


def test_junit_is_counted_and_failures_keep_their_message():
    counts, failures, seconds = gpu_check.read_junit(JUNIT)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert [failure["name"] for failure in failures] == [
        "tests.test_a::test_bad",
        "tests.test_b::test_broken",
    ]
    assert "assert 1 == 2" in failures[0]["message"]
    assert seconds == 2.0


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source tree in the place of ours, with a record of it."""
    for name in ("sparse_compile/a.py", "passes/b.py", "kernels/c.py", "tests/test_d.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n")
    (tmp_path / "sparse_compile" / "passes").symlink_to("../passes")
    hashes = common.source_hashes(tmp_path)
    monkeypatch.setattr(common, "source_hashes", lambda: common_hashes(tmp_path))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    record = {
        "device": "a GPU",
        "counts": {"passed": 3, "failed": 0, "skipped": 0},
        "selection": ["tests"],
        "sources": {"files": hashes},
    }
    common.write_json(gpu_check.NAME, record)
    return tmp_path


def edit(tree: Path, **changes: object) -> None:
    path = tree / "results" / gpu_check.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_hashes_cover_the_folders_and_no_link_or_cache(tree):
    (tree / "tests" / "__pycache__").mkdir()
    (tree / "tests" / "__pycache__" / "test_d.pyc").write_bytes(b"x")
    (tree / "tests" / ".hidden").write_text("x")
    assert list(common_hashes(tree)) == [
        "kernels/c.py",
        "passes/b.py",
        "sparse_compile/a.py",
        "tests/test_d.py",
    ]


def test_unchanged_sources_are_accepted(tree, capsys):
    assert gpu_check.main(["--check"]) == 0
    out = capsys.readouterr().out
    assert "3 passed, 0 failed on a GPU" in out
    assert "The sources are those that ran." in out


def test_changed_added_and_removed_sources_are_named(tree, capsys):
    (tree / "kernels" / "c.py").write_text("# other\n")
    (tree / "kernels" / "new.py").write_text("")
    (tree / "passes" / "b.py").unlink()
    assert gpu_check.main(["--check"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    assert lines == [
        ["changed", "kernels/c.py"],
        ["added", "kernels/new.py"],
        ["removed", "passes/b.py"],
    ]


def test_only_the_total_depends_on_names(tree):
    before = common.total_hash(common_hashes(tree))
    (tree / "kernels" / "c.py").rename(tree / "kernels" / "e.py")
    after = common_hashes(tree)
    assert common.total_hash(after) != before
    assert common.total_hash(dict(reversed(after.items()))) == common.total_hash(after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": ["tests/test_d.py"]}, "the record is partial"),
        ({"counts": {"passed": 3, "failed": 1, "skipped": 0}}, "did not pass"),
        ({"counts": {"passed": 0, "failed": 0, "skipped": 9}}, "did not pass"),
        ({"sources": None}, "is no record of this program"),
    ],
    ids=["partial", "failed", "nothing-ran", "foreign"],
)
def test_a_record_that_proves_nothing_is_refused(tree, capsys, changes, message):
    edit(tree, **changes)
    assert gpu_check.main(["--check"]) == 1
    assert message in capsys.readouterr().out


def test_a_missing_record_is_said(tree, capsys):
    assert gpu_check.main(["--check", "--output", str(tree / "none.json")]) == 1
    assert "does not exist" in capsys.readouterr().out


def test_without_a_gpu_it_refuses(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("UnsupportedEnvironmentError: a GPU was asked for but is absent")


def test_the_marked_tests_run_and_are_recorded(tmp_path, monkeypatch, capsys):
    """The whole recording, with a passing and a failing test in the place of ours."""
    monkeypatch.setattr(gpu_check, "check_gpu", lambda: None)
    monkeypatch.setattr(common, "_device_name", lambda device: "a GPU")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    shutil.copy(common.ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_yes(): assert True\n"
        "@pytest.mark.gpu\ndef test_no(): assert 1 == 2\n"
        "def test_other(): assert False\n"
    )
    monkeypatch.setattr(common, "ROOT", tmp_path)
    code = gpu_check.main(["--output", str(tmp_path / "record.json"), "test_x.py"])
    assert code == 1
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["counts"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert "assert 1 == 2" in record["failures"][0]["message"]
    assert record["device"] == "a GPU"
    assert {"driver", "torch", "triton", "transformers", "python", "date", "command"} <= set(record)
    assert record == json.loads((tmp_path / "out" / gpu_check.NAME).read_text())
    assert "1 passed, 1 failed, 0 skipped" in capsys.readouterr().out


def test_only_files_with_the_marker_are_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    (tmp_path / "tests" / "deep").mkdir(parents=True)
    (tmp_path / "tests" / "test_a.py").write_text("import package_that_the_gpu_machine_lacks\n")
    (tmp_path / "tests" / "deep" / "test_b.py").write_text("pytestmark = pytest.mark.gpu\n")
    assert gpu_check.marked_files(["tests"]) == ["tests/deep/test_b.py"]
    assert gpu_check.marked_files(["tests/deep/test_b.py"]) == ["tests/deep/test_b.py"]


def test_pytest_that_writes_no_results_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "PYTEST", ("-c", "raise SystemExit(4)"))
    with pytest.raises(SparseCompileError, match="exit code 4"):
        gpu_check.run_tests(["tests"], 1)


def test_it_is_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--help"],
        cwd=common.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "--check" in done.stdout
