"""What `sparse-compile doctor --measure` measures with, and the command itself."""

import json

import msgspec
import pytest
import torch

from sparse_compile import rates, settings
from sparse_compile.cli import doctor as doctor_module
from sparse_compile.cli import main
from sparse_compile.cli.measure import rows
from sparse_compile.kernels import device_rates
from sparse_compile.kernels.device_rates import TILE, Plan, add_ones, reread_sums, reread_sums_ref

TINY = Plan(
    copy_bytes=2**16, reread_footprints=(4 * TILE, 16 * TILE), atomic_footprints=(4 * TILE,),
    traffic_bytes=2**18, product_size=16, dtypes=("float32",), n_launches=2, n_runs=1, warm_up_s=0.0,
)  # fmt: skip


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(settings.CACHE_VARIABLE, str(tmp_path))
    rates.lookup.cache_clear()
    yield tmp_path
    rates.lookup.cache_clear()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("n_tiles", "n_programs", "n_reads"), [(1, 1, 1), (3, 4, 5), (8, 3, 8)])
def test_every_tile_is_really_read(n_tiles, n_programs, n_reads):
    x = torch.randint(-1000, 1000, (n_tiles * TILE,), dtype=torch.int32, device=device())
    found = reread_sums(x, n_programs, n_reads)
    assert torch.equal(found, reread_sums_ref(x, n_programs, n_reads))


def test_all_of_the_footprint_is_read_if_there_are_reads_enough():
    n_tiles = 8
    marks = torch.zeros(n_tiles, TILE, dtype=torch.int32, device=device())
    marks[:, 0] = 2 ** torch.arange(n_tiles)
    found = reread_sums(marks.flatten(), 4, 2)
    assert int(found.sum()) == 2**n_tiles - 1


@pytest.mark.parametrize(("n_tiles", "n_programs", "n_adds"), [(1, 2, 3), (5, 2, 5)])
def test_every_addition_is_made(n_tiles, n_programs, n_adds):
    x = torch.zeros(n_tiles * TILE, device=device())
    add_ones(x, n_programs, n_adds)
    assert float(x.sum()) == n_programs * n_adds * TILE
    assert float(x.max()) == -(-n_programs * n_adds // n_tiles)


def test_a_tiny_measurement_can_be_kept_and_read(tmp_path):
    steps = list(device_rates.measure(torch.device("cpu"), TINY))
    assert [found for _, found in steps[:-1]] == [None] * 6
    found = steps[-1][1]
    assert found.device == "cpu"
    assert [level.footprint_bytes for level in found.reread_bytes_per_s] == [4 * TILE, 16 * TILE]
    assert set(found.flops_per_s) == {"float32"}
    rates.write(found, tmp_path / "x.json")
    assert msgspec.json.decode((tmp_path / "x.json").read_bytes(), type=rates.Rates) == found


class TestCommand:
    def test_without_a_gpu_it_is_refused(self, no_gpu, cache, capsys):
        assert main(["doctor", "--measure"]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        first, expected, _ = captured.err.splitlines()
        assert first.startswith("UnsupportedEnvironmentError: a GPU was asked for but is absent")
        assert expected.startswith("  Expected a CUDA device")
        assert list(cache.iterdir()) == []

    def test_output_alone_is_wrong_usage(self, tmp_path, capsys):
        assert main(["doctor", "--output", str(tmp_path / "x.json")]) == 2
        assert "--output FILE goes with --measure" in capsys.readouterr().err

    @pytest.fixture
    def measured(self, cache, monkeypatch):
        """The command as on a machine with a GPU, which is the CPU in truth."""
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        real = device_rates.measure
        monkeypatch.setattr(device_rates, "measure", lambda _: real(torch.device("cpu"), TINY))
        return cache / rates.FOLDER / "cpu.json"

    def test_it_writes_to_the_cache_and_prints_json(self, measured, capsys):
        assert main(["doctor", "--measure", "--json"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out) == json.loads(measured.read_text())
        assert "matrix products ..." in captured.err
        assert str(measured) in captured.err
        known = rates.lookup("cpu")
        assert (known.rates.device, known.note) == ("cpu", "")
        assert [path.name for path in measured.parent.iterdir()] == ["cpu.json"]

    def test_it_writes_to_a_file_and_prints_a_table(self, measured, tmp_path, capsys):
        target = tmp_path / "deep" / "x.json"
        assert main(["doctor", "--measure", "--output", str(target)]) == 0
        out = capsys.readouterr().out
        found = msgspec.json.decode(target.read_bytes(), type=rates.Rates)
        for what, reached in rows(found):
            assert what in out
            assert reached in out
        assert not measured.exists()

    def test_a_file_that_cannot_be_written(self, measured, capsys):
        assert main(["doctor", "--measure", "--output", "/proc/nowhere/x.json"]) == 1
        error = capsys.readouterr().err
        assert "RatesError: /proc/nowhere/x.json cannot be written" in error

    def test_too_little_memory(self, measured, monkeypatch, capsys):
        def full(_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(device_rates, "measure", full)
        assert main(["doctor", "--measure"]) == 1
        assert "RatesError: the GPU has too little free memory" in capsys.readouterr().err


class TestDoctorSaysWhoseRatesAreUsed:
    def test_without_a_gpu(self, no_gpu, cache):
        finding = doctor_module._rates()
        assert finding.status == "ok"
        assert finding.found == "rates of NVIDIA H100 80GB HBM3, since nobody measured cpu"

    @pytest.mark.parametrize(
        ("device", "status", "found"),
        [
            ("NVIDIA Z9", "warn", "since nobody measured NVIDIA Z9"),
            ("NVIDIA H100 80GB HBM3", "ok", "NVIDIA H100 80GB HBM3: "),
        ],
    )
    def test_with_one(self, device, status, found, cache, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
        finding = doctor_module._rates()
        assert finding.status == status
        assert found in finding.found
        assert ("doctor --measure" in finding.effect) == (status == "warn")


@pytest.mark.gpu
def test_measured_rates_are_plausible():
    plan = Plan(
        copy_bytes=2**28, reread_footprints=(2**22, 2**29), atomic_footprints=(2**24,),
        product_size=4096,
    )  # fmt: skip
    found = list(device_rates.measure(torch.device("cuda"), plan))[-1][1]
    cached, memory = (level.bytes_per_s for level in found.reread_bytes_per_s)
    assert memory < cached
    assert 1e11 < found.copy_bytes_per_s < 2e13
    assert found.program_bytes_per_s < memory
    assert 1e-7 < found.launch_s < 1e-3
