"""Rates of devices: where they are looked up, and files that cannot be used."""

import json
import logging

import msgspec
import pytest

from sparse_compile import rates, settings
from sparse_compile.errors import RatesError
from sparse_compile.rates import Level

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(settings.CACHE_VARIABLE, str(tmp_path))
    rates.lookup.cache_clear()
    yield tmp_path
    rates.lookup.cache_clear()


def measured(device: str = H100, **fields) -> rates.Rates:
    known = rates._shipped()[0][H100]
    stamp = {"device": device, "origin": "a test", "copy_bytes_per_s": 1e12, **rates.installed()}
    return msgspec.structs.replace(known, **{**stamp, **fields})


class TestLookup:
    def test_shipped(self):
        found = rates.lookup(H100)
        assert (found.rates.device, found.efficiency.device, found.note) == (H100, H100, "")

    @pytest.mark.parametrize("device", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA Z9", "cpu"])
    def test_others_say_whose_rates_they_get(self, device):
        found = rates.lookup(device)
        assert found.rates.device == H100
        assert found.note == f"rates of {H100}, since nobody measured {device}"

    def test_the_same_model_is_nearer_than_the_default(self):
        known = ["NVIDIA A100-SXM4-80GB", H100, "NVIDIA H200"]
        assert rates._nearest("NVIDIA H200 NVL", known) == "NVIDIA H200"
        assert rates._nearest("NVIDIA A100-PCIE-40GB", known) == "NVIDIA A100-SXM4-80GB"
        assert rates._nearest("NVIDIA L40S", known) == H100

    def test_what_was_measured_here_comes_first(self):
        for device in (H100, "NVIDIA Z9"):
            rates.write(measured(device), rates.cache_file(device))
            found = rates.lookup(device)
            assert (found.rates.origin, found.note) == ("a test", "")
            assert found.efficiency.device == H100

    def test_it_is_remembered_until_something_is_written(self):
        first = rates.lookup(H100)
        assert rates.lookup(H100) is first
        rates.write(measured(), rates.cache_file(H100))
        assert rates.lookup(H100).rates.copy_bytes_per_s == 1e12


class TestFilesThatCannotBeUsed:
    STALE = {
        "torch": ({"torch": "1.0"}, "it was measured with torch 1.0, this is"),
        "triton": ({"triton": "1.0"}, "it was measured with triton 1.0, this is"),
        "device": ({"device": "NVIDIA Z9"}, "it was measured with device NVIDIA Z9, this is"),
    }

    @pytest.mark.parametrize("name", STALE)
    def test_stale_files_are_reported_once_and_ignored(self, name, caplog):
        fields, message = self.STALE[name]
        rates.write(measured(**fields), rates.cache_file(H100))
        with caplog.at_level(logging.WARNING, "sparse_compile"):
            assert rates.lookup(H100).rates.origin != "a test"
            rates.lookup(H100)
        (record,) = caplog.records
        assert message in record.getMessage()
        assert "doctor --measure again" in record.getMessage()

    BROKEN = {
        "empty": "",
        "no-json": "{",
        "list": "[]",
        "binary": "\x00\xff",
        "unknown-field": {"more": 1},
        "zero": {"copy_bytes_per_s": 0},
        "negative": {"launch_s": -1.0},
        "text": {"launch_s": "1"},
        "no-footprint": {"reread_bytes_per_s": []},
        "descending": {"reread_bytes_per_s": [[2, 1.0], [1, 1.0]]},
        "no-dtype": {"flops_per_s": {}},
        "version": {"version": 2},
    }

    @pytest.mark.parametrize("name", BROKEN)
    def test_broken_files_are_reported_once_and_ignored(self, name, caplog):
        broken = self.BROKEN[name]
        if isinstance(broken, dict):
            broken = json.dumps(msgspec.to_builtins(measured()) | broken)
        path = rates.cache_file(H100)
        path.parent.mkdir(parents=True)
        path.write_text(broken, encoding="latin-1")
        with caplog.at_level(logging.WARNING, "sparse_compile"):
            assert rates.lookup(H100).rates.origin != "a test"
            rates.lookup(H100)
        (record,) = caplog.records
        assert str(path) in record.getMessage()

    def test_a_folder_in_its_place(self, caplog):
        rates.cache_file(H100).mkdir(parents=True)
        assert rates.lookup(H100).rates.device == H100
        assert len(caplog.records) == 1

    def test_nothing_is_half_written(self, cache, monkeypatch):
        path = rates.cache_file(H100)
        rates.write(measured(), path)
        before = path.read_bytes()

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(RatesError, match="No space left on device"):
            rates.write(measured(launch_s=1.0), path)
        assert path.read_bytes() == before
        assert [each.name for each in path.parent.iterdir()] == [path.name]


class TestFootprints:
    LEVELS = (Level(100, 8.0), Level(400, 2.0), Level(1600, 1.0))

    @pytest.mark.parametrize(
        ("footprint", "wanted"), [(1, 8.0), (100, 8.0), (200, 4.0), (400, 2.0), (1e9, 1.0)]
    )
    def test_between_levels_the_line_of_the_logarithms(self, footprint, wanted):
        assert rates.at_footprint(self.LEVELS, footprint) == pytest.approx(wanted)

    def test_one_level(self):
        assert rates.at_footprint(self.LEVELS[:1], 10**9) == 8.0


def test_names_of_files():
    assert rates.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert rates.slug("NVIDIA H200") == "nvidia-h200"


def test_an_efficiency_of_nothing_is_refused():
    known = rates.lookup(H100).efficiency
    with pytest.raises(ValueError, match="above 0"):
        msgspec.convert(
            msgspec.to_builtins(known) | {"stages": {"kv_major.merge": 0}}, rates.Efficiency
        )
