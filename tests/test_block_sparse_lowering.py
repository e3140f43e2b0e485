"""Sites become block-sparse attention where the table of winners says so, and compute the same."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from sparse_compile import backend, pipeline, planner, policies, winners
from sparse_compile.config import Config
from sparse_compile.expressions import Load, h, s, t, x
from sparse_compile.ir import KernelPlan, ScoreProgram
from sparse_compile.kernels import block_sparse
from sparse_compile.kernels.triton_text import unprintable
from sparse_compile.passes.detect import find_candidates
from sparse_compile.passes.elements import ElementEvaluator
from sparse_compile.passes.mask_atoms import classify
from sparse_compile.passes.programs import prove
from sparse_compile.passes.shadow import build_shadow
from sparse_compile.testing import in_backend, rewritten_alike
from sparse_compile.winners import Winner

B, H, T, D = 2, 2, 150, 8


def qkv(grad: bool = False) -> list[Tensor]:
    return [torch.randn(B, H, T, D, dtype=torch.float64, requires_grad=grad) for _ in range(3)]


@pytest.fixture
def _ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site is planned for our kernel, whose operator runs on the CPU too."""

    def plan(*args: object, **kwargs: object) -> KernelPlan:
        return KernelPlan(kernel="block_sparse_attention", why="asked for")

    monkeypatch.setattr(policies, "plan", plan)


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, fill: float = -torch.inf) -> Tensor:
    return (q @ k.mT * 0.3).masked_fill(~keep, fill).softmax(-1) @ v


def distances() -> Tensor:
    return torch.arange(T)[:, None] - torch.arange(T)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, (distances() >= 0) & (distances() < 40))


def document(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return attend(q, k, v, same & (distances() >= 0))


def padded(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The first rows keep nothing, and give the mean of all values."""
    return attend(q, k, v, (ids > 1)[:, None, None, :] & (distances() >= 0), fill=-1e9)


def capped(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    scores = 5 * torch.tanh(q @ k.mT / 5) - slope[:, None, None] * distances()
    return scores.masked_fill(distances() < 0, -torch.inf).softmax(-1) @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(distances() < 0, -torch.inf)
    column = sink[None, :, None, None].expand(B, -1, T, 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :T] @ v


def ids() -> Tensor:
    return torch.arange(T).expand(B, -1) // torch.tensor([[60], [33]])


def per_head() -> Tensor:
    return torch.rand(H, dtype=torch.float64, requires_grad=True)


SITES: dict[str, tuple[Callable[..., Tensor], tuple[Callable[[], Tensor], ...]]] = {
    "window": (window, ()),
    "document": (document, (ids,)),
    "padded": (padded, (ids,)),
    "capped": (capped, (per_head,)),
    "sink": (with_sink, (per_head,)),
}


@pytest.mark.usefixtures("_ours")
@pytest.mark.parametrize("name", SITES)
def test_sites_compute_the_same_with_gradients(name: str) -> None:
    function, makers = SITES[name]
    (site,) = rewritten_alike(function, *qkv(grad=True), *(make() for make in makers))
    assert site.status == "rewritten"
    assert site.kernel == "block_sparse_attention"


@pytest.mark.usefixtures("_ours")
def test_lengths_may_be_symbols() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        keep = torch.arange(n)[:, None] >= torch.arange(n)
        return (q @ k.mT).masked_fill(~keep, -torch.inf).softmax(-1) @ v * 1.5

    compiled = torch.compile(function, backend=backend.rewrite_only, dynamic=True)
    for length in (T, 97, 260):
        inputs = [torch.randn(B, H, length, D) for _ in range(3)]
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert {site.kernel for site in backend.last_report().rewritten} == {"block_sparse_attention"}


@pytest.mark.usefixtures("_ours")
def test_layers_share_their_lists() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window(window(q, k, v), k, v)

    nodes: list[str] = []

    def use(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        pipeline.run_passes(gm, inputs, Config())
        nodes.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    inputs = qkv()
    found = torch.compile(function, backend=use)(*inputs)
    torch.testing.assert_close(found, function(*inputs))
    assert sum("list_blocks" in name for name in nodes) == 1
    assert sum("block_sparse_attention" in name for name in nodes) == 2


def planned(head_dim: int, dropout: float = 0.0) -> KernelPlan:
    """The plan on CUDA for a window."""
    q, k, v = (torch.randn(B, H, T, head_dim) for _ in range(3))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = (distances() >= 0) & (distances() < 40)
        weights = (q @ k.mT).masked_fill(~keep, -torch.inf).softmax(-1)
        return torch.dropout(weights, dropout, True) @ v if dropout else weights @ v

    def use(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> KernelPlan:
        shadow = build_shadow(gm, inputs)
        (found,) = find_candidates(shadow)
        assert found.candidate is not None
        proven = prove(found.candidate, ElementEvaluator(shadow.constants))
        return planner.plan(proven, device=torch.device("cuda"), training=False)

    torch._dynamo.reset()  # another head size would become a symbol
    return in_backend(use, function, q, k, v)


def test_the_planner_takes_what_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_device_name", lambda device: "card")
    assert planned(64).kernel == THEIRS
    monkeypatch.setattr(winners, "shipped", lambda: (winner(128, OURS, THEIRS),))
    plan = planned(64)
    assert plan.kernel == OURS
    assert plan.why.endswith("the faster one for causal+window at 128 tokens")


def test_what_flex_attention_refuses_is_ours() -> None:
    assert planned(16).kernel == THEIRS
    plan = planned(8)
    assert plan.kernel == OURS, plan.why
    assert "16 or more, not 8" in plan.why
    assert planned(8, dropout=0.5).kernel == "program_attention"


CAUSAL = s <= t
NAMES = {
    "causal+window": ScoreProgram(keep=sympy.And(CAUSAL, t - s < 9)),
    "causal+chunk": ScoreProgram(
        keep=sympy.And(CAUSAL, sympy.Eq(sympy.floor(t / 8), sympy.floor(s / 8)))
    ),
    "causal+soft_cap": ScoreProgram(keep=CAUSAL, score=5 * sympy.tanh(x / 5)),
    "causal+alibi": ScoreProgram(keep=CAUSAL, score=x + Load(0, h) * (s - t)),
    "bias": ScoreProgram(score=x + Load(0, h, t, s)),
    "causal+sink": ScoreProgram(keep=CAUSAL, sink=Load(0, h)),
    "dense": ScoreProgram(),
}


@pytest.mark.parametrize("name", NAMES)
def test_cases_have_names(name: str) -> None:
    sizes = {one: sympy.Integer(64) for one in (t, s)}
    keep = NAMES[name].keep
    atoms = classify(keep, sizes) if keep is not sympy.true else ()
    assert winners.case_of(atoms, NAMES[name]) == name


def winner(tokens: int, inference: str, training: str, device: str = "card") -> Winner:
    return Winner(
        device=device, case="causal+window", tokens=tokens, inference=inference, training=training
    )  # type: ignore[arg-type]


OURS, THEIRS = "block_sparse_attention", "flex_attention"


def test_the_nearest_measured_length_decides(tmp_path: Path) -> None:
    path = tmp_path / "winners.toml"
    first = [winner(8192, THEIRS, THEIRS), winner(8192, OURS, OURS, device="other")]
    winners.write(first, path)
    winners.write([winner(8192, OURS, THEIRS), winner(32768, OURS, OURS)], path)
    table = winners.parse(path.read_text())
    assert [one.device for one in table] == ["card", "card", "other"]

    def kernel(tokens: int | None, training: bool, case: str = "causal+window") -> str:
        return winners.kernel_for(
            case, device="card", tokens=tokens, training=training, table=table
        )[0]

    assert [kernel(n, False) for n in (100, 8192, 10**6, None)] == [OURS] * 4
    assert [kernel(n, True) for n in (100, 20000, 32768, None)] == [THEIRS, THEIRS, OURS, THEIRS]
    assert kernel(8192, False, case="causal+chunk") == THEIRS


def test_the_shipped_table_can_be_read() -> None:
    assert all(one.tokens > 0 for one in winners.shipped())


def test_what_our_kernel_cannot_compute_is_said() -> None:
    def refused(program: ScoreProgram = ScoreProgram(), **changes: object) -> str:  # noqa: B008
        known = {"device_type": "cuda", "head_dim": 64, "value_dim": 64, "dtype": torch.float16}
        return str(block_sparse.refusal(program, **{**known, **changes}))  # type: ignore[arg-type]

    assert refused() == "None"
    assert "on cpu" in refused(device_type="cpu")
    assert "torch.float64" in refused(dtype=torch.float64)
    assert "head sizes" in refused(value_dim=512)
    assert "factors" in refused(ScoreProgram(weight=Load(0, h)))
    assert "atan(x)" in refused(ScoreProgram(score=sympy.atan(x)))
    assert unprintable(2**x) == "2**x"
