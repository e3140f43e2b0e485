"""Launchers find tuned values: pinned, user cache, shipped table, default; stale ones are left."""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_compile import ConfigError, settings
from sparse_compile.kernels import tuning, tuning_results, tuning_tables
from sparse_compile.kernels.range_kernels import Tiles
from sparse_compile.kernels.tuning import Tuned
from sparse_compile.kernels.tuning_results import Entry, Results, Stamp

KERNEL = "range_forward"
KEY = {"head_dim": 128, "value_dim": 128, "n_tokens": 4096}
PROBLEM = {"head_dim": 128, "value_dim": 128, "n_tokens": 3000}
Q = torch.zeros(1, dtype=torch.float16)
DEFAULT = Tiles(128, 64, 8, 3)  # what the kernel would compute


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of shipped results that is empty but for the tables; the cache is elsewhere."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in tuning_tables.names():
        text = tuning_tables.folder().joinpath(f"{name}.toml").read_text()
        (folder / f"{name}.toml").write_text(text)
    monkeypatch.setattr(tuning_tables, "folder", lambda: folder)
    monkeypatch.setenv(settings.CACHE_VARIABLE, str(tmp_path / "cache"))
    yield folder
    tuning_tables.load.cache_clear()


@pytest.fixture
def user(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuning"


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the library logs, in order."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, level = Keep(), tuning.log.level
    tuning.log.addHandler(handler)
    tuning.log.setLevel(logging.INFO)
    yield found
    tuning.log.removeHandler(handler)
    tuning.log.setLevel(level)


@pytest.fixture
def tuned() -> Tuned[Tiles]:
    return Tuned(KERNEL)


def values(block_m: int) -> dict[str, int]:
    return {"block_m": block_m, "block_n": 32, "num_warps": 4, "num_stages": 2}


def entry(block_m: int, dtype: str = "float16", **key: int) -> Entry:
    return Entry(
        dtype=dtype, key={**KEY, **key}, values=values(block_m), ms=1.0, default_ms=2.0, tried=3
    )


def put(folder: Path, *entries: Entry, **stamp: str) -> Path:
    now = tuning_results.current_stamp(tuning_tables.load(KERNEL))
    results = Results(
        kernel=KERNEL, device=tuning.INTERPRETER, entries=entries,
        stamp=Stamp(**{name: stamp.get(name, getattr(now, name)) for name in now.__struct_fields__}),
    )  # fmt: skip
    path = folder / tuning_results.file_name(KERNEL, tuning.INTERPRETER)
    tuning_results.write(path, results)
    return path


def test_order_of_the_lookup(tuned: Tuned[Tiles], user: Path, shipped: Path) -> None:
    assert tuned.choose(DEFAULT, Q, **PROBLEM) == DEFAULT
    put(shipped, entry(64))
    assert tuned.choose(DEFAULT, Q, **PROBLEM) == DEFAULT  # read once
    tuned.forget()
    assert tuned.choose(DEFAULT, Q, **PROBLEM).block_m == 64
    put(user, entry(32))
    tuned.forget()
    assert tuned.choose(DEFAULT, Q, **PROBLEM).block_m == 32
    with tuned.pinned(block_m=16):
        assert tuned.choose(DEFAULT, Q, **PROBLEM) == DEFAULT._replace(block_m=16)
        with tuned.pinned(num_warps=2):
            both = DEFAULT._replace(block_m=16, num_warps=2)
            assert tuned.choose(DEFAULT, Q, **PROBLEM) == both
        assert tuned.choose(DEFAULT, Q, **PROBLEM).num_warps == DEFAULT.num_warps
    with tuned.pinned():
        assert tuned.choose(DEFAULT, Q, **PROBLEM) == DEFAULT
    assert tuned.choose(DEFAULT, Q, **PROBLEM).block_m == 32


def test_pins_hold_in_other_threads_and_end_with_an_error(tuned: Tuned[Tiles]) -> None:
    found: list[Tiles] = []
    with pytest.raises(RuntimeError), tuned.pinned(block_m=16):  # noqa: PT012
        # the backward runs in a thread of autograd's
        thread = threading.Thread(target=lambda: found.append(tuned.choose(DEFAULT, Q, **PROBLEM)))
        thread.start()
        thread.join()
        raise RuntimeError
    assert found[0].block_m == 16
    assert tuned.choose(DEFAULT, Q, **PROBLEM) == DEFAULT


@pytest.mark.parametrize("wrong", [{"block_m": 24}, {"block_m": "64"}, {"block_x": 64}])
def test_a_wrong_pin_is_refused(tuned: Tuned[Tiles], wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pinned range_forward"), tuned.pinned(**wrong):
        pass


def test_what_is_near_serves_where_the_table_says_so(tuned: Tuned[Tiles], user: Path) -> None:
    put(user, entry(64), entry(32, n_tokens=32768), entry(16, head_dim=64))

    def at(n_tokens: int, **facts: int) -> Tiles:
        return tuned.choose(DEFAULT, Q, **{**PROBLEM, "n_tokens": n_tokens, **facts})

    assert at(4096).block_m == at(4000).block_m == 64
    assert at(8192).block_m == at(1024).block_m == 64  # off by factors of 2 and 4
    assert at(16384).block_m == at(131072).block_m == 32
    assert at(512) == at(300_000) == DEFAULT  # too far from both
    assert at(4096, value_dim=64) == DEFAULT  # such a fact must be the same
    assert at(4096, head_dim=64).block_m == 16
    assert at(4096, head_dim=32) == DEFAULT


def test_sixteen_bit_dtypes_serve_each_other(tuned: Tuned[Tiles], user: Path) -> None:
    put(user, entry(64, "bfloat16"), entry(16, "float32"))
    assert tuned.choose(DEFAULT, Q, **PROBLEM).block_m == 64
    assert tuned.choose(DEFAULT, Q.bfloat16(), **PROBLEM).block_m == 64
    assert tuned.choose(DEFAULT, Q.float(), **PROBLEM).block_m == 16
    put(user, entry(64, "bfloat16"), entry(32, "float16"))
    tuned.forget()
    assert tuned.choose(DEFAULT, Q, **PROBLEM).block_m == 32


@pytest.mark.parametrize("stamp", ["torch", "triton", "source"])
def test_stale_results_are_reported_once_and_not_used(
    tuned: Tuned[Tiles], user: Path, shipped: Path, stamp: str, said: list[str]
) -> None:
    put(user, entry(64), **{stamp: "1.0"})
    put(shipped, entry(32), **{stamp: "1.0"})
    first = tuned.choose(DEFAULT, Q, **PROBLEM)
    tuned.choose(DEFAULT, Q, **{**PROBLEM, "n_tokens": 99})
    del said[-2:]  # what is in force
    # PyTorch compiles no kernel, so what is shipped outlives its versions
    assert first.block_m == (32 if stamp == "torch" else DEFAULT.block_m)
    assert len(said) == (1 if stamp == "torch" else 2)
    assert all("ignored" in text and "sparse-compile tune" in text for text in said)
    assert ("source" if stamp == "source" else f"{stamp} 1.0") in said[0]


BROKEN = {
    "no-json": (lambda text: text[:50], 0),
    "binary": (lambda text: "\xff\x00" + text, 0),
    "no-object": (lambda text: "[]", 0),
    "other-version": (lambda text: text.replace('"version": 1', '"version": 9'), 0),
    "other-kernel": (lambda text: text.replace(KERNEL, "range_backward"), 0),
    "illegal-value": (lambda text: text.replace('"block_m": 64', '"block_m": 63'), 1),
    "string": (lambda text: text.replace('"block_m": 64', '"block_m": "64"'), 1),
    "unknown-value": (lambda text: text.replace('"block_n": 32', '"block_k": 32', 1), 1),
    "other-key": (lambda text: text.replace('"value_dim"', '"value_din"', 1), 1),
    "missing": (lambda text: text.replace('"ms": 1.0,', "", 1), 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_entries_are_skipped_with_one_warning(
    tuned: Tuned[Tiles], user: Path, name: str, said: list[str]
) -> None:
    break_it, n_good = BROKEN[name]
    path = put(user, entry(64), entry(16, n_tokens=65536))
    path.write_text(break_it(path.read_text()), encoding="latin-1")
    assert tuned.choose(DEFAULT, Q, **PROBLEM) == DEFAULT
    far = tuned.choose(DEFAULT, Q, **{**PROBLEM, "n_tokens": 65536})
    assert far == (Tiles(**values(16)) if n_good else DEFAULT)
    (warning,) = [text for text in said if "skipped" in text]
    assert path.name in warning


def test_every_key_is_logged_once(tuned: Tuned[Tiles], said: list[str]) -> None:
    for n_tokens in (4096, 4096, 4095, 2049):
        tuned.choose(DEFAULT, Q, **{**PROBLEM, "n_tokens": n_tokens})
    (line,) = said
    assert line.startswith(
        "range_forward for float16 on Triton interpreter, head_dim 128, value_dim 128, "
        "n_tokens 4096: block_m 128"
    )
    assert line.endswith("(default)")


def test_writing_is_atomic(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(user, entry(64))
    before = path.read_text()

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(KeyboardInterrupt):
        put(user, entry(32))
    assert path.read_text() == before
    assert list(user.iterdir()) == [path]


def test_merging_keeps_others_and_replaces_its_own() -> None:
    old = [entry(64), entry(32, n_tokens=8192)]
    found = tuning_results.merged(old, [entry(16, n_tokens=8192), entry(16, "float32")])
    got = {(one.dtype, one.key["n_tokens"]): one.values["block_m"] for one in found}
    assert got == {("float16", 4096): 64, ("float16", 8192): 16, ("float32", 4096): 16}
    assert tuning_results.merged(found, []) == tuning_results.merged(found[::-1], [])


SOURCE = '''
import triton
import triton.language as tl
from sparse_compile.kernels.helper import help_

LIMIT = 4
FAR = tl.constexpr(9)

@triton.jit
def _kernel(x_ptr, N: tl.constexpr):
    """Says something."""
    if N > 2:
        tl.store(x_ptr, help_(N))

def default_tiles(x):
    return 64

def launch(x):
    _kernel[(1,)](x, 3)
'''
HELPER = "import triton\n\n@triton.jit\ndef help_(n):\n    return n + 1\n"
CHANGES = {  # what is replaced where, and whether the kernel is another one then
    "comment": ("main", "    if N > 2:", "    # why\n    if N > 2:  # so", False),
    "docstring": ("main", "Says something.", "Says more.", False),
    "layout": ("main", "(x_ptr, help_(N))", "(\n            x_ptr,   help_(N)\n        )", False),
    "launcher": ("main", "(x, 3)", "(x, 4)", False),
    "python-constant": ("main", "LIMIT = 4", "LIMIT = 5", False),
    "kernel-constant": ("main", "tl.constexpr(9)", "tl.constexpr(8)", True),
    "body": ("main", "N > 2", "N > 3", True),
    "indent": ("main", "        tl.store", "        pass\n    tl.store", True),
    "default-tiles": ("main", "return 64", "return 32", True),
    "decorator": ("main", "@triton.jit", '@triton.jit(do_not_specialize=["N"])', True),
    "helper": ("helper", "n + 1", "n + 2", True),
    "unused-module": ("other", "n + 1", "n + 2", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_hash_of_a_source_is_that_of_its_kernels(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_tables, "kernels_folder", lambda: tmp_path)
    sources = {"main": SOURCE, "helper": HELPER, "other": HELPER}

    def hashed() -> str:
        for module, text in sources.items():
            (tmp_path / f"{module}.py").write_text(text)
        return tuning_results.source_hash.__wrapped__("main")

    before = hashed()
    where, old, new, is_another = CHANGES[name]
    assert sources[where].count(old) == 1
    sources[where] = sources[where].replace(old, new)
    assert (hashed() != before) == is_another


def test_results_are_json_that_people_can_read(user: Path) -> None:
    path = put(user, entry(64))
    assert path.name == "range_forward.triton-interpreter.json"
    data = json.loads(path.read_text())
    assert data["entries"][0]["values"] == values(64)
    assert set(data["stamp"]) == {"torch", "triton", "source"}


def test_device_names_become_file_names() -> None:
    assert tuning_results.file_name("a_b", "NVIDIA H100 80GB HBM3") == (
        "a_b.nvidia-h100-80gb-hbm3.json"
    )


def test_launchers_use_what_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are the same for other tiles, to rounding; the kernel is asked for those tiles."""
    from sparse_compile.kernels import range_kernels as kernels

    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted")
    q, k, v = (torch.randn(1, h, 40, 16) for h in (2, 1, 1))
    end = torch.arange(1, 41).int()
    first = (end - 8).clamp(min=0)
    grids = []
    launched = kernels._range_forward_kernel

    class Spy:
        def __getitem__(self, grid: tuple[int]) -> Any:
            grids.append(grid)
            return launched[grid]

    monkeypatch.setattr(kernels, "_range_forward_kernel", Spy())
    found = []
    for block_m in (16, 32):
        with kernels.FORWARD.pinned(block_m=block_m):
            found.append(kernels.forward(q, k, v, first, end, 0.25)[0])
    assert grids == [(2 * 3,), (2 * 2,)]
    torch.testing.assert_close(found[0], found[1])
