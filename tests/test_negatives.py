"""Softmaxes and products that are no attention: nothing is touched."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.zoo.check import check
from benchmarks.zoo.entry import Entry
from benchmarks.zoo.negatives import negatives

CERTAIN = [entry for entry in negatives.entries if not entry.has("ambiguous")]
AMBIGUOUS = [entry for entry in negatives.entries if entry.has("ambiguous")]


def _name(entry: Entry) -> str:
    return entry.id


@pytest.mark.parametrize("entry", CERTAIN, ids=_name)
def test_nothing_is_replaced(entry: Entry):
    outcome = check(entry)
    assert outcome.true_sites == 0
    assert outcome.rewritten == 0
    assert not outcome.problems()


@pytest.mark.parametrize("entry", AMBIGUOUS, ids=_name)
def test_whatever_is_done_is_equal(entry: Entry):
    assert not check(entry).problems()
