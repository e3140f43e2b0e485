"""Models that nobody rewrote for us: Hugging Face architectures and third-party packages."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.zoo import third_party
from benchmarks.zoo.check import check
from benchmarks.zoo.entry import Entry

pytest.importorskip("transformers")

from benchmarks.zoo import hf

ARCHITECTURES = list(hf.ci_entries())
OTHERS = [entry for entry in third_party.entries() if entry.id in third_party.CI]


def _name(entry: Entry) -> str:
    return entry.id


def test_the_subset_is_large_enough():
    names = {entry.name.rpartition("-")[0] for entry in ARCHITECTURES}
    assert len(names) >= 60


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=_name)
def test_every_site_of_an_architecture_is_replaced(entry: Entry):
    outcome = check(entry, train=entry.has("train"))
    assert outcome.true_sites > 0
    assert (outcome.gradient_error is not None) == entry.has("train")
    assert not outcome.problems()


@pytest.mark.parametrize("entry", OTHERS, ids=_name)
def test_every_site_of_a_package_is_replaced(entry: Entry):
    outcome = check(entry)
    if outcome.error.startswith("UnavailableError"):
        pytest.skip(outcome.error)
    assert not outcome.problems()
