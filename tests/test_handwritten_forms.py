"""Attention written by hand in every style we know: found, replaced, and equal to eager."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.zoo import forms
from benchmarks.zoo.check import check
from benchmarks.zoo.entry import Entry
from benchmarks.zoo.truth import observe

ENTRIES = list(forms.entries())


def _name(entry: Entry) -> str:
    return entry.id


@pytest.mark.parametrize("entry", ENTRIES, ids=_name)
def test_every_site_is_replaced_and_results_are_equal(entry: Entry):
    outcome = check(entry, train=entry.has("train"))
    assert outcome.true_sites > 0
    assert (outcome.gradient_error is not None) == entry.has("train")
    assert not outcome.problems()


def test_a_good_share_of_the_forms_is_trained():
    assert sum(entry.has("train") for entry in ENTRIES) >= 50


def test_entries_have_distinct_ids():
    assert len({entry.id for entry in ENTRIES}) == len(ENTRIES)


# The truth is what everything above is measured against: it gets tests of its own.


def _scores() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 3, 7, 4) for _ in range(3))


@pytest.mark.parametrize(
    ("attend", "count"),
    [
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, 1),
        (lambda q, k, v: v.mT @ (k @ q.mT).softmax(-2), 1),
        (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, 0),
        (lambda q, k, v: (q @ k.mT).softmax(1) @ v, 0),
        (lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), 0),
        (lambda q, k, v: (lambda e: e @ v / e.sum(-1, keepdim=True))((q @ k.mT).exp()), 1),
        (lambda q, k, v: (lambda e: e @ v / e.sum(-2, keepdim=True).mT)((q @ k.mT).exp()), 0),
        (lambda q, k, v: (q @ k.mT).exp() @ v, 0),
        (lambda q, k, v: (q @ k.mT).log_softmax(-1).exp() @ v, 1),
        (lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v), 1),
        (lambda q, k, v: (q @ k.mT).softmax(-1).sum(-1, keepdim=True) * v, 0),
    ],
    ids=[
        "softmax-keys", "values-left", "softmax-queries", "softmax-heads", "linear", "divide-late",
        "divide-by-another-sum", "no-sum", "log-softmax", "sdpa", "weights-summed",
    ],
)  # fmt: skip
def test_truth_counts_contractions_over_the_softmax_axis(attend, count: int):
    _, truth = observe(attend, _scores(), {})
    assert truth.count == count


def test_truth_tells_module_paths_and_escaping_weights():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.ModuleList([torch.nn.MultiheadAttention(8, 2, batch_first=True)])

        def forward(self, x):
            return self.inner[0](x, x, x)

    _, truth = observe(Model().eval(), (torch.randn(2, 5, 8),), {})
    assert [site.module for site in truth.sites] == ["inner.0"]
    assert truth.sites[0].shape == (4, 5, 5)
    assert truth.count == 1
